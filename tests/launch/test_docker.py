"""The Dockerfiles: what they copy exists, what they install is declared, and who runs it."""

import fnmatch
import pathlib
import re
import runpy
import shutil
import sys
import types
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "launch/docker").iterdir())
KINDS = {"cpu": None, "cuda": "gpu", "tpu": "tpu"}  # The extra that brings jax for the devices.


class Instruction(NamedTuple):
    """One instruction of a Dockerfile."""

    name: str
    value: str


def parse(text):
    """The stages of a Dockerfile; each begins with its FROM."""
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    stages = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, value = line.strip().partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append(Instruction(name, " ".join(value.split())))
    return stages


def values(stage, name):
    return [instruction.value for instruction in stage if instruction.name == name]


def copied(stages):
    """The sources that all stages copy from the checkout."""
    for stage in stages:
        for value in values(stage, "COPY"):
            words = value.split()
            if not words[0].startswith("--from="):
                yield from words[:-1]


def described(root=ROOT):
    """What setup.py of a directory gives to setuptools."""
    given = {}
    stub = types.SimpleNamespace(
        setup=lambda **named: given.update(named), find_packages=lambda **named: [named]
    )
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stub
    try:
        runpy.run_path(str(root / "setup.py"))
    finally:
        sys.modules.pop("setuptools")
        if before:
            sys.modules["setuptools"] = before
    return given


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def dockerfile(request):
    return request.param


@pytest.fixture
def stages(dockerfile):
    return parse(dockerfile.read_text(encoding="utf-8"))


def test_there_is_a_file_for_each_kind_of_device():
    assert [path.name for path in FILES] == [f"Dockerfile.{kind}" for kind in KINDS]


def test_the_wheel_is_built_in_a_stage_of_its_own(stages):
    build, final = stages
    (command,) = values(build, "RUN")
    assert re.match(r"pip wheel --no-cache-dir --no-deps --wheel-dir=dist \. && ", command)
    assert values(build, "FROM") == [values(final, "FROM")[0] + " AS build"]
    # The image gets the environment, neither sources nor the wheel.
    assert values(final, "COPY") == [
        "--from=build /opt/vixml_jax /opt/vixml_jax", "experiments experiments"
    ]  # fmt: skip
    assert "pip" not in " ".join(values(final, "RUN"))
    path = next(value for value in values(final, "ENV") if value.startswith("PATH="))
    assert path.split()[0] == "PATH=/opt/vixml_jax/bin:$PATH"


def test_what_is_installed_is_declared(dockerfile, stages):
    build, _ = stages
    (command,) = values(build, "RUN")
    assert command.split(" && ")[-1] == (
        "/opt/vixml_jax/bin/pip install --no-cache-dir -c constraints.txt "
        '"$(echo dist/*.whl)[$EXTRAS]"'
    )
    (extras,) = (
        value.removeprefix("EXTRAS=").split(",")
        for value in values(build, "ARG")
        if value.startswith("EXTRAS=")
    )
    declared = described()["extras_require"]
    assert set(extras) <= set(declared)
    kind = dockerfile.suffix[1:]
    assert {extra for extra in extras if extra in KINDS.values()} == {KINDS[kind]} - {None}
    if KINDS[kind]:
        library = {"cuda": r"jax\[cuda12\]", "tpu": r"jax\[tpu\]"}[kind]
        assert re.match(library, declared[KINDS[kind]][0])


def test_the_versions_are_those_of_the_tests(stages):
    (base,) = {
        value.removesuffix(" AS build") for stage in stages for value in values(stage, "FROM")
    }
    python = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-[a-z]+", base)
    assert python, f"{base}: expected python:X.Y.Z-slim-RELEASE"
    tested = re.findall(r"^\| (3\.\d+) \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert python[1] in tested
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^jax==[\d.]+; python_version >= \"3\.12\"$", pins, re.MULTILINE)
    # jax[tpu] needs one version of libtpu, which another pin would contradict.
    assert not re.search("^libtpu", pins, re.MULTILINE)


def test_the_sources_are_enough_to_describe_the_package(stages, tmp_path):
    """With a checkout that has nothing but what is copied."""
    build = stages[0]
    for source in copied([build]):
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, tmp_path / source, ignore=ignored)
        else:
            shutil.copy(ROOT / source, tmp_path / source)
    assert described(tmp_path) == described()
    (package,) = described(tmp_path)["packages"]
    assert package == {"include": ["vixml_jax", "vixml_jax.*"]}
    assert (tmp_path / "constraints.txt").exists()
    for directory, patterns in described()["package_data"].items():
        for pattern in patterns:
            assert list(tmp_path.joinpath(*directory.split(".")).glob(pattern)), pattern


def ignored(path, rules):
    """Whether .dockerignore leaves a path of the checkout out; the last rule that fits decides."""
    out = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        names = [path, *(str(parent) for parent in pathlib.PurePosixPath(path).parents)]
        if pattern.startswith("**/"):
            pattern, names = pattern[3:], path.split("/")
        if any(fnmatch.fnmatchcase(name, pattern) for name in names if name != "."):
            out = not rule.startswith("!")
    return out


def test_the_context_is_what_is_copied_and_nothing_else(stages):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    sources = sorted(copied(stages))
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source, rules), source
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sources
    for left_out in (".git/config", "runs/mine/config.json", "data/shop", ".env", "tests/tiny.py"):
        assert ignored(left_out, rules), left_out
    assert ignored("vixml_jax/__pycache__/train.cpython-312.pyc", rules)
    assert not ignored("vixml_jax/presets/quickstart.flags", rules)


def test_the_user_is_not_root_and_can_write_where_it_must(stages):
    final = stages[-1]
    names = [instruction.name for instruction in final]
    assert values(final, "ARG") == ["USER_ID=1000"]  # As in launch/gke.sh.
    assert ': "${USER_ID:=1000}"' in (ROOT / "launch/gke.sh").read_text()
    assert values(final, "USER") == ["$USER_ID"]
    (home,) = values(final, "WORKDIR")
    made = values(final, "RUN")[0].split(" && ")
    assert made[0].startswith('useradd --uid="$USER_ID" ') and f"--home-dir={home} " in made[0]
    assert made[1:] == ["mkdir -p data runs .cache", f"chown -R vixml:vixml {home}"]
    # A volume has the owner that its directory had before it was declared.
    assert names.index("RUN") < names.index("VOLUME")
    assert values(final, "VOLUME") == [f'["{home}/data", "{home}/runs"]']
    assert names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")
    assert values(final, "ENTRYPOINT") == ['["vixml_jax"]']
    assert "vixml_jax = vixml_jax.__main__:main" in described()["entry_points"]["console_scripts"]


def test_the_files_differ_only_in_their_devices():
    """A correction of one is a correction of all."""

    def common(path):
        stages = parse(path.read_text(encoding="utf-8"))
        return [
            (name, re.sub(r"^EXTRAS=.*| NVIDIA_\S+", "", value))
            for stage in stages
            for name, value in stage
        ]

    first, *others = map(common, FILES)
    assert others == [first] * len(others)
    driver = (ROOT / "launch/docker/Dockerfile.cuda").read_text()
    assert "NVIDIA_VISIBLE_DEVICES=all" in driver
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in driver
