"""What all commands share: help, version, presets, flag files, renamed flags, exit statuses."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from absl import flags

import vixml_jax
from vixml_jax import command_line, config, train
from vixml_jax.__main__ import COMMANDS
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import os, signal
from vixml_jax import command_line, errors

def main(argv):
    {what}

command_line.launch(main, lambda: None)
"""


def run(*command, status=0, cwd=None):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.parametrize(
    "what,status,line",
    [
        ("raise errors.InputError('a\\nb')", 2, "error: a b"),
        ("raise errors.NotFiniteError('no number')", 1, "error: no number"),
        ("os.kill(os.getpid(), signal.SIGINT)", 128 + signal.SIGINT, "interrupted"),
        ("print('done')", 0, ""),
    ],
)
def test_errors_end_a_command_in_one_line(what, status, line):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(what=what)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (status, line)


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_short_help_lists_all_flags_on_two_screens(module):
    """Every flag is listed once; --help=all explains each."""
    short, full = run("-m", module, "--help"), run("-m", module, "--help=all")
    lines = short.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 100
    assert f"python -m {module}" in short and "Common flags:" in short
    common, *groups = short.split("Common flags:")[1].split("\n\n")
    listed = re.findall(r"^  --([\w.]+)", common, flags=re.M)
    listed += re.findall(
        r"(?<![\w'])--([\w.]+)=", "\n".join(g for g in groups if "--help=" not in g)
    )
    listed = [name for name in listed if name != "preset"]
    explained = re.findall(r"^  --([\w.]+)=", full, flags=re.M)
    shared = {"quiet", "verbose", "preset", "flagfile", "verbosity"}
    assert len(listed) == len(set(listed)), "a flag is listed twice"
    assert set(explained) - shared == set(listed) and len(explained) > 5


def test_short_help_has_no_heading_of_common_flags_where_there_are_none():
    short = run("-m", "vixml_jax.benchmarks.packing", "--help")
    assert "Common flags:" not in short and "Other flags:" not in short
    assert "\n\nFlags:\n  --data=" in short


def test_the_console_script_lists_and_runs_commands():
    listed = run("-m", "vixml_jax")
    assert all(f"  {command} " in listed for command in COMMANDS)
    assert run("-m", "vixml_jax", "--version").startswith(f"vixml_jax {vixml_jax.__version__} (")
    assert run("-m", "vixml_jax", "train", "--version") == run("-m", "vixml_jax", "--version")
    said = run("-m", "vixml_jax", "evalute", status=2)
    assert said.count("\n") == 1 and "did you mean evaluate?" in said
    assert "--workdir: " in run("-m", "vixml_jax", "evaluate", status=2)


def test_renamed_flags_are_refused_with_their_new_names():
    values = flags.FlagValues()
    config.define_flags(values)
    for old, new in config.RENAMED.items():
        assert old not in values and new in values
    for old, new in (
        ("loop.choose_by=P@1", "--loop.choose_by was renamed: use --loop.monitor"),
        ("noeval.memory_joint", "--noeval.memory_joint was renamed: use --noknn.joint"),
        ("batch.prefetch=2", "--batch.prefetch was removed: leave it out"),
    ):
        said = run("-m", "vixml_jax.train", f"--{old}", status=2)
        assert said == f"error: {new}\n"
    said = run("-m", "vixml_jax.evaluate", "--tune_memory=P@1", status=2)
    assert said == "error: --tune_memory was renamed: use --tune\n"
    said = run("-m", "vixml_jax.benchmarks.communication", "--encode_chunk=1", status=2)
    assert said == "error: --encode_chunk was renamed: use --microbatch_rows\n"
    # A command that never had the flag does not suggest one that it does not have.
    said = run("-m", "vixml_jax.export", "--tune_memory=P@1", status=2)
    assert "--tune_memory: no such flag; --help lists" in said and "renamed" not in said
    assert "--nonsense: no such flag; --help lists the flags of the command" in run(
        "-m", "vixml_jax.evaluate", "--nonsense", status=2
    )


def test_presets_are_flags_of_train():
    assert {"frozen", "minilm", "quickstart", "small"} <= set(command_line.presets())
    for name in command_line.presets():
        values = flags.FlagValues()
        config.define_flags(values)
        values(["train", *command_line.expand([f"--preset={name}", "--loop.epochs=3"])])
        assert config.from_flags(values).loop.epochs == 3  # Later flags override the preset's.
    with pytest.raises(InputError, match="--preset=mini: expected one of frozen, minilm"):
        command_line.expand(["--preset", "mini"])


def test_flag_files_include_others_beside_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.flags").write_text(
        "# comment\n\n--seed=1\n--flagfile=b.flags\n  --seed=3\n// a comment, too\n"
    )
    (tmp_path / "sub" / "b.flags").write_text("--seed=2\n--preset=small\n")
    found = command_line.expand(["--data=x", "--flagfile", "sub/a.flags", "--seed=4"])
    assert [flag for flag in found if "seed" in flag] == [f"--seed={n}" for n in (1, 2, 3, 4)]
    assert found[0] == "--data=x" and "--loop.epochs=30" in found
    (tmp_path / "c.flags").write_text("--flagfile=sub/a.flags\n")  # From the working directory.
    assert command_line.expand(["--flagfile=c.flags"])[0] == "--seed=1"
    (tmp_path / "sub" / "b.flags").write_text("--flagfile=a.flags\n")
    with pytest.raises(InputError, match="includes it again"):
        command_line.expand(["--flagfile=sub/a.flags"])
    with pytest.raises(InputError, match=r"--flagfile=none.flags: cannot be read"):
        command_line.expand(["--flagfile=none.flags"])
    monkeypatch.setenv("HOME", str(tmp_path / "sub"))
    (tmp_path / "sub" / "home.flags").write_text("--seed=5\n")
    assert command_line.expand(["--flagfile=~/home.flags"]) == ["--seed=5"]


@pytest.mark.parametrize(
    "flag,problem",
    [
        ("--loop.epoch=1", "--loop.epoch: no such flag; did you mean --loop.epochs?"),
        ("--batch.size=x", "--batch.size=x: expected an integer"),
        ("--batch.size=0", "--batch.size=0: expected at least 2"),
        ("--knn.weight=x", "--knn.weight=x: expected a number"),
        ("--plan=x", "--plan=x: expected true or false"),
        ("--loop.patience=1", "--loop.patience=1 needs a metric to wait for"),
    ],
)
def test_wrong_flags_of_train_are_explained_in_one_line(flag, problem):
    error = run("-m", "vixml_jax.train", flag, status=2)
    assert error.startswith(f"error: {problem}") and error.count("\n") == 1


def test_wrong_flags_of_other_commands_are_explained_in_one_line():
    error = run("-m", "vixml_jax.evaluate", "--split=dev", status=2)
    assert error == "error: --split=dev: expected one of test, valid, train\n"
    assert run("-m", "vixml_jax.predict", "--k=0", status=2) == (
        "error: --k=0: expected at least 1\n"
    )


def test_help_ends_quietly_if_its_reader_does():
    done = subprocess.run(
        f"{sys.executable} -m vixml_jax.train --help=all | head -n 1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_lines_of_a_flag_file_without_dashes_are_refused(tmp_path):
    """They are not ignored: `batch.size=32` is a flag without its dashes."""
    path = tmp_path / "a.flags"
    path.write_text("--seed=1\nbatch.size=32\n")
    error = run("-m", "vixml_jax.train", f"--flagfile={path}", status=2)
    assert error == (
        f"error: {path}, line 2: 'batch.size=32': expected a flag such as --seed=1, or a comment "
        "that starts with #\n"
    )


def test_package_data_are_declared():
    """What the wheel must carry: presets and the marker of typed packages."""
    package = pathlib.Path(vixml_jax.__file__).parent
    assert (package / "py.typed").exists() and list((package / "presets").glob("*.flags"))
    assert (package / "report" / "templates").is_dir()
    about = (ROOT / "setup.py").read_text()
    for pattern in ("py.typed", "presets/*.flags", "templates/*", "vixml_jax.__main__:main"):
        assert pattern in about


def test_quiet_prints_results_only():
    """--quiet leaves the result lines of a command; an error is still an error."""
    said = run("-m", "vixml_jax.prepare", "--quiet", "--source=nowhere", "--out=x", status=2)
    assert said.startswith("error: ") and said.count("\n") == 1


def test_help_needs_no_heavy_library():
    """Help does not wait for libraries that only some commands need."""
    code = (
        "import sys; sys.argv = ['vixml_jax', '--help']\n"
        "from vixml_jax.__main__ import main\nmain()\n"
        "assert not {'jax', 'transformers', 'tensorflow', 'jinja2', 'orbax'} & set(sys.modules)"
    )
    run("-c", code)


def test_resuming_is_explained_by_the_command_itself():
    assert train.COMMON_FLAGS[:2] == ("data", "workdir")
    assert os.path.exists(ROOT / "experiments" / "quickstart.flags")
