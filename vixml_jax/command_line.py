"""What all commands share: help, presets and flag files, renamed flags, version, exit statuses."""

import difflib
import functools
import importlib.metadata
import importlib.resources
import os
import platform
import re
import shlex
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

import vixml_jax
from vixml_jax import config, errors
from vixml_jax.errors import InputError, NotFiniteError, Preempted
from vixml_jax.runtime import console, flag_fields, signals

WIDTH = 100  # Columns of help.
# Flags of version 0.1 that commands other than train had, and what they are called now.
RENAMED = config.RENAMED | {
    "encode_chunk": "microbatch_rows",
    "hide_images": "drop_images",
    "memory_joint": "knn.joint",
    "memory_k": "knn.k",
    "memory_temperature": "knn.temperature",
    "memory_weight": "knn.weight",
    "peer": "baseline",
    "peers": "baselines",
    "report_pictures": "report_images",
    "tune_memory": "tune",
}


# Parts of absl's errors about the values of flags, and plain words for them.
_PLAIN: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    ("^flag --", "--"),
    (
        "value should be one of <(.*)>",
        lambda found: f"expected one of {found[1].replace('|', ', ')}",
    ),
    (r"invalid literal for int\(\).*", "expected an integer"),
    ("could not convert string to float.*", "expected a number"),
    (r"\('Non-boolean argument.*", "expected true or false"),
    (
        r"\S+ is not an? \w+ in the range \[(\S+), (\S+)\]$",
        lambda found: f"expected from {found[1]} to {found[2]}",
    ),
    (r"\S+ is not a positive \w+$", "expected at least 1"),
    (r"\S+ is not a non-negative \w+$", "expected at least 0"),
)


def launch(
    main: Callable[[Sequence[str]], None],
    define_flags: Callable[[], None],
    *,
    common: Sequence[str] = (),
    resumable: bool = False,
) -> None:
    """Parses the flags and runs a command; errors other than bugs are reported in one line.

    The process exits with 0 (done), 1 (a bug, or a loss that is not finite), 2 (bad input), 75
    (stopped by a signal, everything saved), 129, 130 or 143 (ended by SIGHUP, SIGINT or SIGTERM) or
    141 (the reader of standard output has ended).

    Args:
      main: Of the command; the docstring of its module is the first line of `--help`.
      define_flags: Defines the command's own flags.
      common: Names of the flags that `--help` explains; it lists the others with their defaults.
      resumable: Whether the same command, run again, goes on where a signal stopped it; its status
        is then 75.
    """
    if sys.stdout is None:
        _exit("error: standard output is closed: redirect it, to /dev/null for example", 2)
    console.guard_output()
    before = set(flags.FLAGS)
    define_flags()
    own = [name for name in flags.FLAGS if name not in before]
    flags.DEFINE_boolean("quiet", False, "Print results, warnings and errors only.")
    flags.DEFINE_boolean("verbose", False, "Print details, such as every large array of a run.")
    words = {word.replace("_", "-") for word in sys.argv[1:]}
    if words & {"--version", "-version"}:
        _print_and_exit(version())
    if words & {"--help", "-help", "-h", "-?", "--helpshort"}:
        _print_and_exit(short_help(main, own, common))
    if words & {"--help=all", "-help=all", "--helpfull", "--help=full"}:
        _print_and_exit(full_help(main, own))

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            # Libraries log much that is not for users, and log what they raise as well.
            logging.set_verbosity(logging.FATAL)
        if flags.FLAGS.quiet or flags.FLAGS.verbose:
            quiet = flags.FLAGS.quiet
            console.set_level(console.Level.QUIET if quiet else console.Level.VERBOSE)
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}: flags start with --")
            end = functools.partial(_end, resumable)
            with signals.handling(end, functools.partial(_end_late, resumable)):
                main(argv)
                sys.stdout.flush()
        except errors.OutputError as error:
            console.discard_output()
            _exit(f"error: {error}", error.status)
        except (InputError, NotFiniteError) as error:
            _exit(f"error: {error}", 2 if isinstance(error, InputError) else 1)
        except Preempted as stop:
            _exit(errors.last_line(stop), errors.PREEMPTED)
        except errors.Terminated as error:
            _exit(*signals.ending(error.number, resumable=False))
        except KeyboardInterrupt:
            _exit(*signals.ending(signal.SIGINT, resumable=False))
        except Exception as error:
            fault = errors.disk_fault(error)
            if fault is not None:  # Where a command has no better message.
                path = getattr(error, "filename", None)
                where = f"{path}: " if path else ""
                _exit(f"error: {where}{fault}; {errors.disk_remedy(fault)}", 2)
            # The message of a bug may hold a text of the data.
            print(console.printable(traceback.format_exc()), end="", file=sys.stderr, flush=True)
            errors.report_failure(console.printable(f"{type(error).__name__}: {error}"), 1)
            sys.exit(1)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS([argv[0], *expand(argv[1:])])
            for name in own:
                flag_fields.check_number(name, flags.FLAGS[name].value)
            return rest
        except flags.UnrecognizedFlagError as error:
            _exit(f"error: {_renamed(error.flagname) or _unknown(error.flagname)}", 2)
        except (flags.Error, InputError) as error:
            _exit(f"error: {_plain(str(error))}", 2)

    sys.unraisablehook = _all_but_echoes
    app.run(guarded, flags_parser=parse)


def _print_and_exit(text: str) -> NoReturn:
    try:
        print(text, flush=True)
    except errors.OutputError as error:
        console.discard_output()
        if error.status == 2:  # Else the reader of a pipe, such as `head`, has ended.
            _exit(f"error: {error}", 2)
    sys.exit(0)


def _end(resumable: bool, number: int) -> None:
    """Ends a command from its main thread, so that it removes what is half written."""
    for other in signals.NUMBERS:  # The clean-up is not interrupted; `_end_late` bounds it.
        signal.signal(other, lambda number, frame: None)
    if resumable and errors.is_alone():  # Other processes would wait for this one.
        raise errors.stopped_by(signal.Signals(number).name)
    raise KeyboardInterrupt if number == signal.SIGINT else errors.Terminated(number)


def _end_late(resumable: bool, number: int, over: threading.Event) -> None:
    """Ends a command whose main thread has not ended it, since it compiles a program, say."""
    if not over.wait(signals.GRACE_S):
        signals.leave(*signals.ending(number, resumable=resumable and errors.is_alone()))


def _renamed(name: str) -> str | None:
    """What to say of a flag that this command has under a new name; None: it has no such flag."""
    bare = name.removeprefix("no") if name.removeprefix("no") in RENAMED else name
    if RENAMED.get(bare) not in flags.FLAGS:
        return None
    prefix = "no" if bare != name else ""
    return f"--{name} was renamed: use --{prefix}{RENAMED[bare]}"


def _unknown(name: str) -> str:
    if name in config.REMOVED:
        return f"--{name} was removed: leave it out"
    similar = difflib.get_close_matches(name, list(flags.FLAGS), 1)
    hint = f"did you mean --{similar[0]}?" if similar else "--help lists the flags of the command"
    return f"--{name}: no such flag; {hint}"


def _plain(error: str) -> str:
    """An error of absl about the value of a flag, in the form of the other messages."""
    for pattern, expected in _PLAIN:
        error = re.sub(pattern, expected, error)
    return error


def expand(arguments: Iterable[str], including: tuple[str, ...] = ()) -> list[str]:
    """Command-line arguments with each `--preset` and `--flagfile` replaced by its lines.

    Later flags override earlier ones, so flags after a preset change it. A flag file may include
    others: a relative path is looked up beside the including file, then in the working directory.

    Args:
      arguments: Without the program's name.
      including: Files being read, outermost first.

    Raises:
      InputError: If a file is missing, unreadable, or includes itself, or a line is no flag.
    """
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.lstrip("-") not in ("preset", "flagfile") or not name.startswith("-"):
            found.append(argument)
            continue
        value = value if equals else next(rest, "")
        preset = name.lstrip("-") == "preset"
        path = _preset_path(value) if preset else _flagfile_path(value, including)
        if path in including:
            raise InputError(f"{including[-1]}: includes {value}, which includes it again")
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--flagfile={value}: cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            if line and not line.startswith(("-", "#", "//")):
                raise InputError(
                    f"{path}, line {number}: {line[:60]!r}: expected a flag such as --seed=1, or a "
                    "comment that starts with #"
                )
        found += expand((line for line in lines if line.startswith("-")), (*including, path))
    return found


def presets() -> list[str]:
    """Names of the presets that are installed with the package."""
    directory = importlib.resources.files(vixml_jax) / "presets"
    names = (entry.name for entry in directory.iterdir())
    return sorted(name.removesuffix(".flags") for name in names if name.endswith(".flags"))


def _preset_path(name: str) -> str:
    if name not in presets():
        raise InputError(f"--preset={name}: expected one of {', '.join(presets())}")
    return os.fspath(importlib.resources.files(vixml_jax) / "presets" / f"{name}.flags")


def _flagfile_path(path: str, including: tuple[str, ...]) -> str:
    path = os.path.expanduser(path)
    beside = os.path.join(os.path.dirname(including[-1]), path) if including else path
    return os.path.abspath(beside if os.path.exists(beside) else path)


def version() -> str:
    """Version of the package, of Python and of the libraries that decide a run's numbers."""
    parts = [f"Python {platform.python_version()}"]
    for name in ("jax", "flax", "numpy"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} not installed")
    return f"vixml_jax {vixml_jax.__version__} ({', '.join(parts)})"


def short_help(main: Callable[..., None], own: Sequence[str], common: Sequence[str]) -> str:
    """One line for each common flag; the other flags of the command, grouped, with defaults."""
    lines = [*_heading(main), *(["", "Common flags:"] if common else [])]
    for name in common:
        about = _help(name).split(". ")[0].rstrip(".")
        switch = flags.FLAGS[name].boolean and not flags.FLAGS[name].default
        spelled = f"--{name}" if switch else _spelled(name)
        text = f"  {spelled:36} {about}"
        lines.append(text if len(text) <= WIDTH else text[: WIDTH - 4].rsplit(" ", 1)[0] + " ...")
    for group, names in _grouped(
        (name for name in own if name not in common), "Other flags" if common else "Flags"
    ).items():
        lines += ["", f"{group}:"]
        lines += textwrap.wrap(
            "  ".join(map(_spelled, names)), WIDTH, initial_indent="  ", subsequent_indent="  ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    lines.append("")
    if "loop.epochs" in own:
        lines.append(f"Presets (--preset=NAME): {', '.join(presets())}")
    lines.append("--help=all explains every flag. --quiet and --verbose print less and more.")
    return "\n".join(lines)


def full_help(main: Callable[..., None], own: Sequence[str]) -> str:
    """Every flag of the command with its explanation and default, then those of libraries."""
    lines = _heading(main)
    for group, names in _grouped([*own, "quiet", "verbose"], "Flags").items():
        lines += ["", f"{group}:"]
        for name in names:
            lines.append(f"  {_spelled(name)}")
            lines += textwrap.wrap(
                _help(name), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    lines += ["", "Flags of all commands:"]
    others = {
        "--preset=NAME": f"Flags of a preset: {', '.join(presets())}.",
        "--flagfile=FILE": "Flags from a file, one a line; lines that start with # are comments.",
        "--version": "Print the version and stop.",
        "--verbosity=N": "Log level of libraries: 1 shows their information, -1 warnings.",
    }
    for name, about in others.items():
        lines += [f"  {name}", *textwrap.wrap(
            about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )]  # fmt: skip
    return "\n".join(lines)


def _heading(main: Callable[..., None]) -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = main.__module__ if main.__module__ != "__main__" or spec is None else spec.name
    about = (sys.modules[main.__module__].__doc__ or "").strip().split("\n\n")[0]
    name = name.removesuffix(".__main__")
    return [*textwrap.wrap(about, WIDTH), "", f"Usage: python -m {name} [--flag=value ...]"]


def _grouped(names: Iterable[str], rest: str) -> dict[str, list[str]]:
    """Flag names by the part before the dot; `rest` is the group of those without one."""
    found: dict[str, list[str]] = {}
    for name in names:
        group, dot, _ = name.partition(".")
        found.setdefault(f"{group} flags" if dot else rest, []).append(name)
    return found


def _help(name: str) -> str:
    """The explanation of a flag, without the list of choices that absl puts in front."""
    return re.sub(r"^<[^>]*>:\s*", "", flags.FLAGS[name].help)


def _spelled(name: str) -> str:
    """A flag with its default, as it could be given."""
    flag = flags.FLAGS[name]
    if flag.boolean:
        return f"--{name}=" + ("" if flag.default is None else str(flag.default).lower())
    default = "" if flag.default_as_str is None else flag.default_as_str.strip("'")
    return f"--{name}={shlex.quote(_home(default)) if ' ' in default else _home(default)}"


def _home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~", 1) if home != "/" and text.startswith(home) else text


def _all_but_echoes(unraisable: Any) -> None:
    """Prints an exception that nobody can catch, but for the echoes of one that was raised.

    Where one of many arrays cannot be written, Orbax closes its event loop with the first error,
    which is raised; each of the others then fails to report its own there.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit(line: str, status: int) -> None:
    line = console.printable(" ".join(line.split()))
    by_signal = status == errors.PREEMPTED or status - 128 in signals.NUMBERS
    if by_signal and errors.is_alone():
        signals.leave(line, status)  # Other threads may still compile or write.
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # Standard error may be closed or full.
        console.discard_error()
    if status != errors.PREEMPTED:  # All processes reach that status by themselves.
        errors.report_failure(line, status)
    sys.exit(status)
