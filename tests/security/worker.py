"""Attacks files in a process of its own, with bounds on time and memory.

`python -m tests.security.worker MODULE ROOT SEED COUNT` imports MODULE, whose `Target(root)` has a
method `attack(rng)`: it damages some files, uses them, and returns (name of the file, "refused",
"same" or "other"); whatever it raises ends the process. Tests call `run`.
"""

import collections
import faulthandler
import importlib
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

from tests import host_devices

ROOT = pathlib.Path(__file__).parents[2]
_TIME_S = 10  # Of a processor, for one attack.
_WAIT_S = 60  # Longest time of one attack, on a machine with much else to do.
_MEMORY = 1 << 30  # Bytes in addition to what valid files need.


def run(module, root, seed, count):
    """Attacks in a process; returns {name of a file: {outcome: number}}.

    Args:
      module: "tests.security.NAME".
      root: Directory of the valid files, which the process leaves as they are.
      seed: Of the attacks.
      count: Number of attacks.
    """
    command = [sys.executable, "-m", __name__, module, str(root), str(seed), str(count)]
    environment = {**host_devices.environment(1), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    about = f"seed {seed}: {done.stdout[-500:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, about
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(sum(outcomes.values()) for outcomes in counts.values()) == count, about
    return counts


def _memory():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(module, root, seed, count):
    """Runs attacks; prints a line for each, and at last how they went."""
    target = importlib.import_module(module).Target(pathlib.Path(root))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + _MEMORY,) * 2)
    counts = collections.defaultdict(collections.Counter)
    for n in range(int(count)):
        # A generator for each attack, so that one can be repeated alone.
        rng = np.random.default_rng((int(seed), n))
        faulthandler.dump_traceback_later(_WAIT_S, exit=True)
        start = time.process_time()
        print(f"attack {n}:", end=" ", flush=True)
        name, outcome = target.attack(rng)
        seconds = time.process_time() - start
        print(f"{outcome} in {seconds:.2f} s", flush=True)
        assert seconds < _TIME_S
        counts[name][outcome] += 1
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
