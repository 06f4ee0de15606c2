"""The user guide: the site builds, links resolve, commands parse, and the wording is checked."""

import ast
import html.parser
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests import chromium
from vixml_jax import __main__ as commands

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLES = [
    path for path in sorted((ROOT / "experiments").glob("*.flags")) if path.name != "base.flags"
]
SHELL = ("", "bash", "sh", "shell", "console")
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "NO_MKDOCS_2_WARNING": "1",
}
# Flags of programs that are not ours, as the guide mentions them.
OTHER_FLAGS = {"--strict", "--dry_run", "--delete", "--processes", "--nodes", "--flagfile"}
OTHER_FLAGS |= {"--preset", "--help", "--version", "--logdir"}
OTHER_FLAGS |= {"--gpus", "--init", "--net", "--ntasks", "--privileged"}  # Docker and Slurm.


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    language: str
    lines: list[str]


def blocks(path):
    """The fenced blocks of a page; a block in a list is indented."""
    found, language, lines, start = [], None, [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        fence = re.match(r"\s*```\s*([\w-]*)", line)
        if fence and language is None:
            language, lines, start = fence[1], [], number
        elif fence:
            found.append(Block(f"{path.name}:{start}", language, lines))
            language = None
        elif language is not None:
            lines.append(line.strip() if language in SHELL else line)
    return found


SHELL_BLOCKS = [block for path in PAGES for block in blocks(path) if block.language in SHELL]


def typed_lines(block):
    """The lines that run our programs, with those that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(block.lines)).split("\n")
    ours = r"\bpython\S* -m vixml_jax|(^|/|\s)vixml_jax \w|\blaunch/|^docker run "
    return [line.removeprefix("$ ") for line in joined if re.search(ours, line)]


def simple_commands(line):
    """The words of each command of a line, without variables set before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, "&&"]:
        if not set(word) <= set("|&;"):
            words += [word] if words or not re.match(r"\w+=", word) else []
        elif words:
            yield words
            words = []


def find_commands():
    """(where, module, arguments) of every command of ours in the guide."""
    for block in SHELL_BLOCKS:
        for words in (words for line in typed_lines(block) for words in simple_commands(line)):
            program = pathlib.PurePath(words[0]).name
            if words[:2] == ["docker", "run"]:
                image = next(i for i, word in enumerate(words) if word.startswith("vixml_jax:"))
                yield block.where, commands.COMMANDS[words[image + 1]][0], words[image + 2 :]
            elif program == "vixml_jax" and not words[1].startswith("-"):
                yield block.where, commands.COMMANDS[words[1]][0], words[2:]
            elif words[1:3] and words[1] == "-m" and words[2].split(".")[0] == "vixml_jax":
                yield block.where, words[2], words[3:]
            elif "--" in words:  # A launch script, with flags of `train`.
                yield block.where, "vixml_jax.train", words[words.index("--") + 1 :]


COMMANDS = [*find_commands()]


@pytest.fixture(scope="module")
def parsed():
    """What `parse_commands` finds of the guide's commands, and of those that it does not use."""
    asked = [[module, arguments] for _, module, arguments in COMMANDS]
    asked += [[module, ["--help"]] for module, _ in commands.COMMANDS.values()]
    asked += [
        [f"vixml_jax.benchmarks.{path.stem}", ["--help"]]
        for path in (ROOT / "vixml_jax/benchmarks").glob("*.py")
        if path.stem != "__init__"
    ]
    asked += [
        [f"vixml_jax.benchmarks.{path.parent.name}", ["--help"]]
        for path in (ROOT / "vixml_jax/benchmarks").glob("*/__main__.py")
    ]
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("parse_commands.py"))],
        input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, env=ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("\n")[-1])


def build(config, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        capture_output=True, text=True, cwd=ROOT, env=ENV,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_site_has_every_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nowhere", "#nowhere"])
def test_strict_build_refuses_a_broken_link(link, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Title\n\n[text]({link})\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nnav: [index.md]\nextra_css: []\n"
        "plugins: [search]\n"
    )
    done = build(config, tmp_path / "site")
    assert done.returncode == 1 and "nowhere" in done.stdout + done.stderr


class _Requests(html.parser.HTMLParser):
    """Urls that a browser loads by itself: not those of links."""

    def __init__(self):
        super().__init__()
        self.urls, self.ids, self.links = [], set(), []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        loads = tag in ("script", "img", "iframe", "source") or (
            tag == "link"
            and attributes.get("rel") in ("stylesheet", "icon", "preload", "preconnect")
        )
        url = attributes.get("src") or attributes.get("href")
        if url and loads:
            self.urls.append(url)
        elif url and tag == "a":
            self.links.append(url)


@pytest.fixture(scope="module")
def documents(site):
    found = {}
    for path in site.rglob("*.html"):
        found[path] = _Requests()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def test_pages_load_nothing_from_other_hosts(site, documents):
    for path, document in documents.items():
        others = [url for url in document.urls if re.match(r"(\w+:)?//", url)]
        assert not others, f"{path.name}: {others}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path


def test_links_within_the_site_lead_to_pages_and_anchors(site, documents):
    """Also those to the API, whose anchors only exist once the site is built."""
    for path, document in documents.items():
        if path.name == "404.html":
            continue
        for link in document.links:
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            place = (path.parent / target).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{path.name}: {link}"
            if anchor and place in documents:
                assert anchor in documents[place].ids, f"{path.name}: {link}"


def test_pages_fit_a_phone(site):
    """Wide tables and code scroll by themselves; the page does not."""
    with chromium.launch() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
            for name in ("index", "results", "reproducing", "api"):
                page.goto((site / f"{name}.html").as_uri())
                width = page.evaluate("document.documentElement.scrollWidth")
                assert width <= 390, f"{name}.html: {width} pixels wide"


@pytest.mark.parametrize("path", PAGES[:2], ids=lambda path: path.name)
def test_links_to_files_lead_to_files(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not re.match(r"\w+:|#", target):
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_guide_has_commands_of_every_kind():
    named = {module for _, module, _ in COMMANDS}
    assert {module for module, _ in commands.COMMANDS.values()} <= named
    assert len(COMMANDS) > 60


def test_every_command_parses(parsed):
    faults = [
        f"{where}: {module} {shlex.join(arguments)}: {fault}"
        for (where, module, arguments), fault in zip(COMMANDS, parsed["faults"], strict=False)
        if fault
    ]
    assert not faults, "\n".join(faults)


def test_every_flag_that_is_mentioned_exists(parsed):
    known = {flag for module in parsed["modules"].values() for flag in module["flags"]}
    known |= {f"no{flag}" for flag in known} | {"quiet", "verbose"}
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.]*\*?", code):
                name = flag[2:].rstrip(".")
                group = name.endswith(".*") and any(one.startswith(name[:-1]) for one in known)
                assert group or name in known or flag in OTHER_FLAGS, f"{path.name}: {flag}"


LAUNCHES = [
    (block.where, line)
    for block in SHELL_BLOCKS
    for line in typed_lines(block)
    if "launch/" in line and not line.startswith(("docker ", "kubectl ", "python "))
]


@pytest.mark.parametrize(("where", "line"), LAUNCHES)
def test_launch_scripts_take_what_the_guide_gives_them(where, line):
    words = shlex.split(line, comments=True)
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    arguments = words[at + 1 :]
    done = subprocess.run(
        ["bash", words[at], "--dry_run", *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**ENV, "HERE": str(ROOT / "launch"), "VENV": "missing", **given},
        stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: {done.stderr}"
    for argument in arguments[arguments.index("--") + 1 :]:
        assert argument in done.stdout + done.stderr, where


BUILDS = [
    (block.where, line)
    for block in SHELL_BLOCKS
    for line in typed_lines(block)
    if line.startswith("docker build ")
]


def test_images_are_built_from_files_and_arguments_that_exist():
    assert BUILDS
    for where, line in BUILDS:
        words = shlex.split(line)
        path = ROOT / words[words.index("-f") + 1]
        assert path.parent.name == "docker" and path.exists(), where
        for name in re.findall(r"--build-arg=(\w+)=", line):
            assert re.search(rf"^ARG {name}=", path.read_text(), re.MULTILINE), where
        assert words[words.index("-t") + 1].startswith("vixml_jax:") and words[-1] == ".", where


def test_python_blocks_are_python():
    found = [block for path in PAGES for block in blocks(path) if block.language == "python"]
    assert found
    for block in found:
        try:
            ast.parse("\n".join(block.lines))
        except SyntaxError as error:
            pytest.fail(f"{block.where}: {error}")


def test_files_and_modules_that_are_mentioned_exist():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:experiments|launch|tests|docs)/[\w./-]*\w\.\w+", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
        for name in re.findall(r"\bvixml_jax(?:\.[A-Za-z_]\w*)+", text):
            assert _find_module(name), f"{path.name}: {name}"


def _find_module(name):
    """Whether a dotted name is a module, or a name that a module's file holds."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        source = place.with_suffix(".py") if end > 1 else place / "__init__.py"
        if source.exists():
            text = source.read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", text) for part in parts[end:])
        if place.is_dir() and end == len(parts):
            return True
    return False


def test_reproducing_names_every_experiment_with_the_numbers_of_its_file():
    rows = (ROOT / "docs/reproducing.md").read_text(encoding="utf-8").split("\n")
    for path in EXAMPLES:
        if not re.match("lf_|mm_", path.name):
            continue
        (row,) = (row for row in rows if row.startswith(f"| `{path.name}` |"))
        head = path.read_text(encoding="utf-8").split("\n")[0]
        for number in re.findall(r"(?:text|images) (\d\d\.\d\d)", head):
            assert f"| {number} |" in row, path.name
        assert len(re.findall(r"\| \d\d\.\d\d ", row)) == len(re.findall(r"\d\d\.\d\d", head))


# Words that version 0.1 used in a sense of its own, as a reader would meet them.
OLD_WORDS = [
    r"\bdoors?\b", r"\bpictures?\b", r"\bvot(?:e[sd]?|ing)\b", r"\bjudg(?:e[sd]?|ing|ement)\b",
    r"\bpeers?\b", r"\bdealt\b", r"\brooms?\b", r"\btold\b", r"\bwhole or not\b",
    r"\bremember(?:ed|s)?\b", r"\bsealed\b", r"\bstand-?ins?\b", r"\bsurvival\b", r"\ba wish\b",
    r"\b(?:with|without|by|near|tuned) memory\b",
    r"\bmemory(?:_(?:weight|k|temperature|joint)| tuned| as published)",
    r", memory\s*\|", r"\bhide_images\b", r"\bchoose_by\b", r"\bencode_chunk\b", r"\banswers/",
]  # fmt: skip


def old_words(text):
    return [found[0] for word in OLD_WORDS for found in re.finditer(word, text, re.IGNORECASE)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_use_the_words_of_the_field(path):
    assert not old_words(path.read_text(encoding="utf-8"))


def test_help_uses_the_words_of_the_field(parsed):
    found = {name: old_words(module["help"]) for name, module in parsed["modules"].items()}
    assert not {name: words for name, words in found.items() if words}


def test_api_page_uses_the_words_of_the_field(site):
    text = re.sub(r"<[^>]*>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert not old_words(text)


def test_troubleshooting_quotes_messages_that_exist():
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "vixml_jax").rglob("*.py"))
    source = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(files))
    source += re.sub(r"\{[^{}\"]*\}", "...", source)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    headings = [line for line in page.split("\n") if line.startswith("### ")]
    for heading in headings:
        for quoted in re.findall(r'"([^"]+)"', heading):
            for fragment in filter(None, map(str.strip, quoted.split("..."))):
                assert fragment in source, heading
