"""Commands that are ended by signals at random moments and started again, and what they leave."""

import collections
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CRASHES = ("Traceback", "Segmentation fault", "Fatal Python error", "terminate called")
_UNFINISHED = re.compile(r"\.tmp-|\.lock$")
_MEASURED = re.compile(r"seconds|_gib|date|created|since")  # Parts of keys whose values differ.

_Contents = dict[str, dict[str, str]]  # Of each file: values by key.


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      fault: The injected fault.
      count: How often it was injected.
      recovered: How often the run ended as it should.
      note: Details.
    """

    fault: str
    count: int
    recovered: int
    note: str


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """Waits for a condition or the end of the process; returns whether the process still runs."""
    while process.poll() is None and not happened():
        time.sleep(0.001)
    return process.poll() is None


def moment(rng: np.random.Generator, seconds: float) -> Callable[[], bool]:
    """A condition that becomes true at a time drawn uniformly over the next `seconds`."""
    end = time.monotonic() + rng.uniform(0, seconds)
    return lambda: time.monotonic() >= end


def wait_for_start(process: subprocess.Popen) -> None:
    """Waits until a command handles SIGTERM, the last of the signals for which it does so.

    Before that the Python interpreter starts, and a signal may end it with a traceback of its own.
    """

    def handled() -> bool:
        with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
            masks = [line.split()[1] for line in file if line.startswith("SigCgt:")]
        return bool(masks) and bool(int(masks[0], 16) >> (signal.SIGTERM - 1) & 1)

    wait_for(process, handled)


class Job(NamedTuple):
    """A command that is killed and started again.

    Attributes:
      name: Of the command.
      arguments: Its flags; {} is the directory of a trial, a copy of that of `make_jobs`.
      output: File or directory that it writes, relative to that directory.
      at_once: Whether the output appears as a whole, or else file by file.
      done_before: What it says instead of succeeding if the killed command had finished.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    at_once: bool = True
    done_before: str = "nothing"

    def start(self, directory: str) -> subprocess.Popen:
        """Starts the command in a trial's directory and returns the process."""
        command = [sys.executable, "-m", f"vixml_jax.{self.name}"]
        command += [argument.format(directory) for argument in self.arguments]
        return subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


def undisturbed(job: Job, directory: str) -> float:
    """Runs a command to its end; returns the seconds it took."""
    then, process = time.monotonic(), job.start(directory)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{job.name} ended with status {process.returncode}: {output}")
    return time.monotonic() - then


def listing(directory: str) -> set[str]:
    """Paths of all files and directories below a directory, relative to it."""
    return {
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, folders, files in os.walk(directory)
        for name in (*folders, *files)
    }


def contents(directory: str, output: str) -> _Contents:
    """Values by key of each JSON file of an output; other files have one value.

    Measured times and the path of the directory are left out, and so are the values of pages and
    descriptions for readers, which hold both.
    """
    found = {}
    for name in listing(os.path.join(directory, output)):
        path = os.path.join(directory, output, name)
        if os.path.isdir(path):
            continue
        with open(path, "rb") as file:
            data = file.read().replace(directory.encode(), b"DIRECTORY")
        if path.endswith(".json"):
            values = json.loads(data)
            values = values.items() if isinstance(values, dict) else [("", values)]
            found[name] = {key: str(value) for key, value in values if not _MEASURED.search(key)}
        elif path.endswith((".html", ".md")):
            found[name] = {"": str(data.rstrip().endswith(b"</html>"))}
        else:
            found[name] = {"": hashlib.sha256(data).hexdigest()}
    return found


class Tree(NamedTuple):
    """What a command is to leave.

    Attributes:
      old: Contents of its output before it starts.
      new: Contents that an undisturbed command writes, without what differs between two of them.
      files: Paths of all files and directories afterwards.
    """

    old: _Contents
    new: _Contents
    files: set[str]


def expect(job: Job, template: str, directory: str) -> tuple[Tree, float]:
    """Runs a command twice undisturbed; returns what it is to leave, and the seconds it takes."""
    found, seconds = [], 0.0
    for number in range(2):
        trial = shutil.copytree(template, os.path.join(directory, str(number)))
        old = contents(trial, job.output)
        seconds = undisturbed(job, trial)
        found.append((contents(trial, job.output), listing(trial)))
    (new, files), (other, _) = found
    new = {
        name: {key: value for key, value in values.items() if other[name].get(key) == value}
        for name, values in new.items()
    }
    return Tree(old, new, files), seconds


def is_like(found: _Contents, wanted: _Contents) -> bool:
    """Whether there are the same files with the wanted values."""
    return found.keys() == wanted.keys() and all(
        values.items() <= found[name].items() for name, values in wanted.items()
    )


def is_mixture(job: Job, found: _Contents, tree: Tree) -> bool:
    """Whether an output is neither the earlier one nor the new one, or has a file of neither."""
    if job.at_once:
        return not is_like(found, tree.old) and not is_like(found, tree.new)
    return not tree.old.keys() <= found.keys() or not all(
        any(name in wanted and is_like({name: values}, {name: wanted[name]}) for wanted in tree[:2])
        for name, values in found.items()
    )


def kill(
    job: Job,
    directory: str,
    number: int,
    within: float,
    rng: np.random.Generator,
    *,
    writing: bool,
) -> tuple[int, str]:
    """Starts a command and signals it at a moment after it has begun to handle signals.

    Args:
      job: The command.
      directory: Of the trial.
      number: Of the signal.
      within: Seconds in which the moment is.
      rng: Draws the moment.
      writing: Whether they begin when something appears beside or in the output.

    Returns:
      Exit status and output; the status is 0 if it ended before.
    """
    output = os.path.join(directory, job.output)
    places = [path for path in (os.path.dirname(output), output) if os.path.isdir(path)]

    def names() -> list[list[str]]:
        return [sorted(os.listdir(path)) for path in places]

    before, process = names(), job.start(directory)
    wait_for_start(process)
    if writing:
        wait_for(process, lambda: names() != before)
    wait_for(process, moment(rng, within))
    if process.poll() is None:
        process.send_signal(number)
    said, _ = process.communicate()
    return process.returncode, said


def kills(job: Job, template: str, count: int, seed: int) -> Row:
    """Ends a command `count` times, half of them while it writes, and starts it again each time.

    A command that has ended before does not count; another one is started in its place.

    Args:
      job: The command.
      template: Directory that each trial starts with a copy of; copies are made beside it.
      count: Number of kills.
      seed: Of the moments.
    """
    rng, trials = np.random.default_rng((seed, *job.name.encode())), f"{template}.{job.name}"
    tree, seconds = expect(job, template, trials)
    faults, notes, done = collections.Counter(), [], 0
    within = {False: seconds, True: seconds / 4}
    # Commands ignore a signal that is ignored where they start, as SIGHUP is under nohup.
    numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    while done < count:
        trial = shutil.copytree(template, os.path.join(trials, "killed"))
        number = numbers[done % len(numbers)]
        writing = bool((done + done // len(numbers)) % 2)
        status, said = kill(job, trial, number, within[writing], rng, writing=writing)
        if not status:
            within[writing] *= 0.7  # It had ended.
        else:
            mixed = is_mixture(job, _present(trial, job), tree)
            again = job.start(trial)
            later, _ = again.communicate()
            left = listing(trial) - tree.files
            happened = {
                "other statuses": status not in (-number, 128 + number),
                "tracebacks": any(crash in said + later for crash in _CRASHES),
                "failures": again.returncode and job.done_before not in later,
                "mixtures": mixed,
                "lost": not is_like(contents(trial, job.output), tree.new),
                "leftovers": left,
            }
            wrong = [kind for kind, happens in happened.items() if happens]
            faults.update(dict.fromkeys(happened, 0))
            faults.update(wrong)
            done += 1
            if wrong:
                notes.append(
                    f"{number.name}, status {status}: {', '.join(wrong)} {sorted(left)[:3]}: "
                    f"{said.strip()[-600:]!r}, then {again.returncode}: {later.strip()[-300:]!r}"
                )
        shutil.rmtree(trial)
    note = ", ".join(f"{times} {kind}" for kind, times in faults.items())
    return Row(
        f"{job.name} ended by a signal", count, count - len(notes), "; ".join([note, *notes])
    )


def _present(directory: str, job: Job) -> _Contents:
    """Contents of an output, without what is still being written beside its files."""
    found = contents(directory, job.output)
    return {name: values for name, values in found.items() if not _UNFINISHED.search(name)}
