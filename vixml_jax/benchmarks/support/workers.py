"""Programs timed in turns: each in its own process, pinned to the same cores, idle in between."""

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

# A description of the program, and a function that runs one round of it.
Prepared = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


class Worker:
    """A child process that prepares its programs once and then times them on request.

    Pinning the process to its cores before anything is imported sets the sizes of the thread pools
    of XLA and torch alike, without flags of either.
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
                # On an accelerator all programs are in its memory at once.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
        )
        self.pid = self._process.pid
        self.about = self._read()

    def time(self, program: str) -> dict[str, Any]:
        """Runs one round of a program; returns the child's report, with `seconds`."""
        self._process.stdin.write(program + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the child process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker of the benchmark exited with status {self._process.wait()}")


def cluster_flags(count: int) -> list[list[str]]:
    """Flags of each of `count` processes on this machine that form one cluster; none for one."""
    if count == 1:
        return [[]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_index={index}"]
        for index in range(count)
    ]


def serve(prepare: Callable[[list[str], dict[str, Any]], dict[str, Prepared]]) -> bool:
    """In a child process: prepares the programs, then times one round for each name it reads.

    Args:
      prepare: (names of programs, settings) -> prepared programs by name.

    Returns:
      Whether this process is a child.
    """
    if len(sys.argv) < 4 or sys.argv[1] != "--worker":
        return False
    os.sched_setaffinity(0, {int(core) for core in os.environ["VIXML_CORES"].split(",")})
    host_memory.bound_freed_pages()  # For every program alike.
    prepared = prepare(json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps({name: about for name, (about, _) in prepared.items()}), flush=True)
    for line in sys.stdin:
        run = prepared[line.strip()][1]
        start = time.perf_counter()
        report = run()
        print(json.dumps({"seconds": time.perf_counter() - start, **report}), flush=True)
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
    """Runs programs in turn, A B C A B C ..., and prints their speeds and ratios.

    Programs whose names begin with the same word share a process.

    Args:
      module: The benchmark, which calls `serve` in the children.
      programs: Names that its `prepare` accepts, such as "ours, packed".
      ratios: Pairs of programs whose speeds are compared round by round.
      settings: Passed to `prepare`; `threads` is the number of cores of each process.
      rounds: Rounds of each program.
      texts: Number of texts of a round, from the description of a program.
      unit: What is counted, if not texts.

    Returns:
      For each program, the reports of its rounds, joined with its description.
    """
    groups: dict[str, list[str]] = {}
    for name in programs:
        groups.setdefault(name.split(",")[0], []).append(name)
    started = {
        group: Worker(module, names, settings, settings["threads"])
        for group, names in groups.items()
    }
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name in programs:
            worker = started[name.split(",")[0]]
            reports[name].append(worker.about[name] | worker.time(name))
    for worker in started.values():
        worker.close()
    seconds_of = {name: [row["seconds"] for row in rows] for name, rows in reports.items()}
    options = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{'program':28s} {unit + '/s':>9s}  (median of {rounds} rounds; {options})")
    for name, seconds in seconds_of.items():
        count = texts(reports[name][0])
        print(f"{name:28s} {count / statistics.median(seconds):9.1f}")
    for ours, baseline in ratios:
        if baseline in seconds_of:
            quotients = [b / a for a, b in zip(seconds_of[ours], seconds_of[baseline], strict=True)]
            print(
                f"{ours} : {baseline} = {statistics.median(quotients):.2f} "
                f"({min(quotients):.2f} to {max(quotients):.2f})"
            )
    return reports
