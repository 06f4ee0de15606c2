"""What it takes to lose a run: kills, signals, a full disk, damage and a loss that is no number.

    python -m vixml_jax.benchmarks.fault_injection [--kills=25 --stops=10 --seed=0]

Trains a tiny run in processes of their own, does something bad to them, starts the same command
again until it is done, and holds the last checkpoint bit for bit against that of a run that
nothing happened to. Half of the kills, and of the signals, come at moments drawn uniformly over
the time of a run from the start of its process, half while a checkpoint is being written. The disk
that fills is a small tmpfs, which root alone may mount; without, that row says so.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax import workdir as workdir_lib
from vixml_jax.data import preprocessing
from vixml_jax.storage import digests

DISK_BYTES = 6 << 20


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      fault: What was done,
      count: how often,
      lived: and how often it ended as it should.
      told: What there is to say of it.
    """

    fault: str
    count: int
    lived: int
    told: str


def make_data(directory: str) -> str:
    """A tiny prepared data set; returns its path."""
    rng = np.random.default_rng(0)
    words = [f"{stem}{n}" for stem in "ab" for n in range(10)]
    raw = os.path.join(directory, "raw")
    os.makedirs(raw)

    def write(name: str, lines: list[str]) -> None:
        with open(os.path.join(raw, name), "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)

    write("lbl.raw.txt", [f"label {word}" for word in words])
    for split, count in (("trn", 90), ("tst", 30)):
        pairs = rng.integers(0, 10, (count, 2))
        write(f"{split}.raw.txt", [f"a{a} b{b}" for a, b in pairs])
        write(f"{split}_X_Y.txt", [f"{count} 20", *(f"{a}:1 {10 + b}:1" for a, b in pairs)])
    out = os.path.join(directory, "data")
    preprocessing.prepare(preprocessing.read_source(raw), out, preprocessing.Settings(max_tokens=8))
    return out


class Run:
    """A training run and the command that starts it."""

    def __init__(self, data: str, workdir: str, **changes: Any):
        flagged = {
            "model.num_layers": 1, "model.width": 16, "model.num_heads": 2,
            "model.mlp_width": 32, "model.num_images": 0, "labels.num_free": 7,
            "labels.mlp_width": 32, "labels.num_heads": 2, "loss.num_negatives": 4,
            "batch.size": 16, "batch.row_width": 16, "batch.cluster_start": 0,
            "batch.cluster_every": 1, "batch.cluster_size": 4, "batch.curriculum": 1,
            "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 3, "loop.epochs": 6,
            "loop.save_every": 1, "loop.eval_every": 2, "eval.k": 10, "eval.block": 32,
        }  # fmt: skip
        flagged |= {"data": data, "workdir": workdir} | changes
        self.workdir = workdir
        self.checkpoints = os.path.join(workdir, workdir_lib.CHECKPOINTS)
        self._command = [sys.executable, "-m", "vixml_jax.train"]
        self._command += [f"--{name}={value}" for name, value in flagged.items()]

    def start(self) -> subprocess.Popen:
        """The process that trains."""
        return subprocess.Popen(
            self._command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self) -> tuple[int, str]:
        """Trains until the process ends; its status, and what it said."""
        process = self.start()
        said, _ = process.communicate()
        return process.returncode, said

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        try:
            return any(not name.isdigit() for name in os.listdir(self.checkpoints))
        except FileNotFoundError:
            return False

    def saved(self) -> list[int]:
        """Steps of the checkpoints."""
        return digests.steps(self.checkpoints)

    def state(self) -> dict[str, np.ndarray]:
        """All of the newest checkpoint."""
        import jax
        import orbax.checkpoint as ocp

        path = os.path.join(self.checkpoints, str(self.saved()[-1]))
        items = {name: ocp.args.StandardRestore() for name in ("model", "training")}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*items)) as checkpointer:
            found = checkpointer.restore(path, args=ocp.args.Composite(**items))
        leaves = jax.tree_util.tree_leaves_with_path({name: found[name] for name in items})
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes()
        for name, value in one.items()
    )


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """Waits until something happened, or the process ended; whether it still runs."""
    while process.poll() is None and not happened():
        time.sleep(0.001)
    return process.poll() is None


def moment(rng: np.random.Generator, seconds: float) -> Callable[[], bool]:
    """True from a time on that is drawn uniformly over so many seconds from now."""
    end = time.monotonic() + rng.uniform(0, seconds)
    return lambda: time.monotonic() >= end


def kills(
    make: Callable[[], Run], whole: dict[str, np.ndarray], seconds: float, count: int, seed: int
) -> list[Row]:
    """Kills runs so many times, half of them while they save, and finishes what it killed.

    A run that ended before its moment came does not count; the next kill is of a new one.
    """
    rng = np.random.default_rng((seed, 0))
    killed = {"kill -9 at a random moment": 0, "kill -9 while it saves": 0}
    lived = dict.fromkeys(killed, 0)
    lost, run, hits = [], make(), []

    def conclude() -> None:
        status, said = run.finish()
        if status or not same(run.state(), whole) or os.path.exists(run.checkpoints + ".damaged"):
            lost.append(said.strip().split("\n")[-1])
        else:
            for name in hits:
                lived[name] += 1
        hits.clear()

    while sum(killed.values()) < count:
        saving = sum(killed.values()) % 2 == 1
        process = run.start()
        over = moment(rng, seconds)
        alive = wait_for(process, over)
        if alive and saving:
            alive = wait_for(process, run.is_saving)
            time.sleep(rng.uniform(0, 0.05))  # Somewhere in the writing.
        process.kill()
        process.communicate()
        if not alive:  # It was done.
            conclude()
            run = make()
            continue
        name = "kill -9 while it saves" if saving else "kill -9 at a random moment"
        killed[name] += 1
        hits.append(name)
    conclude()
    told = "; ".join(lost) or "resumed to the same bits"
    return [Row(name, killed[name], lived[name], told) for name in killed]


def stops(
    make: Callable[[], Run], whole: dict[str, np.ndarray], seconds: float, count: int, seed: int
) -> Row:
    """Sends SIGTERM to so many runs, half of them while they save, and starts them again."""
    rng = np.random.default_rng((seed, 1))
    lived, took = 0, []
    ends = {"saved": 0, "nothing to save": 0, "not yet there": 0, "over": 0, "lost": 0}
    for number in range(count):
        run = make()
        process = run.start()
        alive = wait_for(process, moment(rng, seconds))
        if alive and number % 2:
            wait_for(process, run.is_saving)
        then = time.monotonic()
        process.terminate()
        said, _ = process.communicate()
        status, line = process.returncode, said.strip().split("\n")[-1]
        saved = run.saved()
        how = "lost"
        if status == errors.PREEMPTED and "; to resume: " in line:
            took.append(time.monotonic() - then)
            stands = bool(saved) and f"saved at step {saved[-1]};" in line
            how = "saved" if stands else "lost" if "saved at" in line else "nothing to save"
        elif status == -signal.SIGTERM and not saved:
            how = "not yet there"  # While Python imports, a signal does what it does to any.
        elif status == 0:
            how = "over"
        ends[how] += 1
        lived += how != "lost" and run.finish()[0] == 0 and same(run.state(), whole)
    told = ", ".join(f"{name}: {times}" for name, times in ends.items() if times)
    return Row("SIGTERM", count, lived, f"{told}; {max(took, default=0):.1f} s at most to leave")


def damage(run: Run, whole: dict[str, np.ndarray]) -> Row:
    """Cuts the largest file of the newest checkpoint of a run that was killed."""
    process = run.start()
    wait_for(process, lambda: len(run.saved()) > 1 and run.saved()[-1] > 10)
    process.kill()
    process.communicate()
    newest = run.saved()[-1]
    top = os.path.join(run.checkpoints, str(newest))
    files = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
    largest = max(files, key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)
    status, said = run.finish()
    lines = [line for line in said.split("\n") if f"step {newest} is damaged" in line]
    aside = os.path.isdir(os.path.join(run.checkpoints + ".damaged", str(newest)))
    fine = status == 0 and len(lines) == 1 and aside and same(run.state(), whole)
    return Row("the newest checkpoint cut", 1, int(fine), lines[0] if lines else said[-200:])


def not_finite(run: Run) -> Row:
    """A learning rate at which nothing stays finite."""
    status, said = run.finish()
    line = said.strip().split("\n")[-1]
    finite = all(np.isfinite(x).all() for x in (run.state() if run.saved() else {}).values())
    fine = status == 1 and finite and "Traceback" not in said and "not finite" in line
    return Row("a loss that is not finite", 1, int(fine), f"{status}: {line}")


def full_disk(make: Callable[[str], Run], whole: dict[str, np.ndarray], directory: str) -> Row:
    """Fills the disk of a run while it trains, makes room, and starts it again."""
    name = "the disk full"
    os.makedirs(directory)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        return Row(name, 0, 0, "not done: only root may mount a tmpfs")
    try:
        run = make(os.path.join(directory, "run"))
        process = run.start()
        wait_for(process, lambda: len(run.saved()) > 0)
        filler = os.path.join(directory, "filler")
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        said, _ = process.communicate()
        line = said.strip().split("\n")[-1]
        left = run.saved()
        whole_one, damaged = digests.newest_whole(run.checkpoints)
        os.remove(filler)
        fine = process.returncode == 2 and "Traceback" not in said and "No space left" in line
        fine = fine and bool(left) and whole_one == left[-1] and not damaged
        fine = fine and run.finish()[0] == 0 and same(run.state(), whole)
        return Row(name, 1, int(fine), f"{process.returncode}: {line}")
    finally:
        subprocess.run(["umount", directory], check=True, capture_output=True)


def survive(directory: str, *, num_kills: int, num_stops: int, seed: int) -> list[Row]:
    """All faults, each on runs of its own below a directory."""
    data = make_data(directory)
    count = iter(range(10**6))

    def make(**changes: Any) -> Run:
        return Run(data, os.path.join(directory, f"run{next(count)}"), **changes)

    # The first run fills the cache of compiled programs; the second one takes as long as others.
    for _ in range(2):
        run, then = make(), time.monotonic()
        status, said = run.finish()
        seconds = time.monotonic() - then
        if status:
            raise RuntimeError(f"the run that nothing happens to ended with {status}: {said}")
    whole = run.state()
    print(f"a run takes {seconds:.1f} s, {run.saved()[-1]} steps of it", flush=True)
    rows = kills(make, whole, seconds, num_kills, seed)
    rows.append(stops(make, whole, seconds, num_stops, seed))
    rows.append(damage(make(), whole))
    rows.append(not_finite(make(**{"optimizer.learning_rate": 1e30})))
    rows.append(
        full_disk(lambda workdir: Run(data, workdir), whole, os.path.join(directory, "disk"))
    )
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        rows = survive(directory, num_kills=values.kills, num_stops=values.stops, seed=values.seed)
    print(f"{'fault':28s} {'times':>5s} {'lived':>5s}")
    for row in rows:
        print(f"{row.fault:28s} {row.count:5d} {row.lived:5d}  {row.told}")
    print(json.dumps([row._asdict() for row in rows]))
    if any(row.lived < row.count for row in rows):
        sys.exit(1)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_integer("kills", 25, "How often runs are killed.", lower_bound=0)
    flags.DEFINE_integer("stops", 10, "How many runs get SIGTERM.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the moments.", lower_bound=0)


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
