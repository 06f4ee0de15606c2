"""Programs that take turns: each in a process of its own, pinned alike, idle while others run."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from vixml_jax.runtime import host_memory

# What a program says of itself, and a function that runs one round of it.
Prepared = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


class Worker:
    """A child process that prepares its programs once and then times those it is told to.

    Pinning the process to its processors before anything is imported sets the thread pools of
    XLA and of torch alike, without flags of either.
    """

    def __init__(self, module: str, programs: list[str], settings: dict[str, Any], threads: int):
        ask = json.dumps(programs), json.dumps(settings)
        command = [sys.executable, "-m", module, "--worker", *ask]
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "VIXML_CORES": ",".join(map(str, cores)),
                "OMP_NUM_THREADS": str(threads),
            },
        )
        self.pid = self._process.pid
        self.about = self._read()

    def time(self, program: str) -> dict[str, Any]:
        """Runs one round; what the child reports of it, seconds among it."""
        self._process.stdin.write(program + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the child."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a benchmark's program ended with status {self._process.wait()}")


def together(count: int) -> list[list[str]]:
    """The flags by which each of `count` processes here finds the others; one alone needs none."""
    if count == 1:
        return [[]]
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    return [
        [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_index={index}"]
        for index in range(count)
    ]


def serve(prepare: Callable[[list[str], dict[str, Any]], dict[str, Prepared]]) -> bool:
    """In a child: prepares its programs and answers each line, a program's name, with one timed
    round of it.

    Args:
      prepare: (programs, settings) -> each of them, prepared.

    Returns:
      Whether this process is a child.
    """
    if len(sys.argv) < 4 or sys.argv[1] != "--worker":
        return False
    os.sched_setaffinity(0, {int(core) for core in os.environ["VIXML_CORES"].split(",")})
    host_memory.keep_freed_pages()  # For every program alike.
    prepared = prepare(json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps({name: about for name, (about, _) in prepared.items()}), flush=True)
    for line in sys.stdin:
        run = prepared[line.strip()][1]
        start = time.perf_counter()
        said = run()
        print(json.dumps({"seconds": time.perf_counter() - start, **said}), flush=True)
    return True


def compare(
    module: str,
    programs: Sequence[str],
    ratios: Sequence[tuple[str, str]],
    settings: dict[str, Any],
    *,
    rounds: int,
    texts: Callable[[dict[str, Any]], int],
    unit: str = "texts",
) -> dict[str, list[dict[str, Any]]]:
    """Runs programs in turn, A B C A B C ..., and prints texts a second and ratios.

    Programs whose names begin with the same word share a process, and what they can.

    Args:
      module: Whose `serve` answers in the children.
      programs: Names that its `prepare` knows, as "ours, packed".
      ratios: Pairs whose speeds are compared, round by round.
      settings: Handed to `prepare`; `threads` is how many processors each has.
      rounds: Of each program.
      texts: From what a child says of itself to the texts of a round.
      unit: What texts are called where they are something else.

    Returns:
      What each program said of each of its rounds, and of itself.
    """
    groups: dict[str, list[str]] = {}
    for name in programs:
        groups.setdefault(name.split(",")[0], []).append(name)
    started = {
        group: Worker(module, names, settings, settings["threads"])
        for group, names in groups.items()
    }
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name in programs:
            worker = started[name.split(",")[0]]
            said[name].append(worker.about[name] | worker.time(name))
    for worker in started.values():
        worker.close()
    found = {name: [one["seconds"] for one in rows] for name, rows in said.items()}
    options = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{'program':28s} {unit + '/s':>9s}  (median of {rounds} rounds; {options})")
    for name, seconds in found.items():
        count = texts(said[name][0])
        print(f"{name:28s} {count / statistics.median(seconds):9.1f}")
    for ours, peer in ratios:
        if peer in found:
            quotients = [b / a for a, b in zip(found[ours], found[peer], strict=True)]
            print(
                f"{ours} : {peer} = {statistics.median(quotients):.2f} "
                f"({min(quotients):.2f} to {max(quotients):.2f})"
            )
    return said
