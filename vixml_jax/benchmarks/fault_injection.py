"""Fault injection: kills, signals, a damaged checkpoint, a full disk, a loss that is not finite.

    python -m vixml_jax.benchmarks.fault_injection [--kills=25 --stops=10 --seed=0]

Trains a tiny run in a process of its own, injects a fault, starts the same command again until
training is complete, and compares the last checkpoint bit for bit with that of an undisturbed run.
The commands that prepare data, evaluate, add labels and export are ended by SIGKILL, SIGTERM,
SIGINT and SIGHUP in turn and started again: what they write must be the earlier version or the new
one, and in the end equal that of an undisturbed command, with no other file left. The kills are
shared out equally among the commands.

Half of the kills and of the signals come at times drawn uniformly over the duration of a command,
the other half while it writes. The disk that fills is a small tmpfs, which only root can mount;
otherwise that row is skipped and says so.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line, errors
from vixml_jax import workdir as workdir_lib
from vixml_jax.benchmarks.support import killed_commands
from vixml_jax.benchmarks.support.killed_commands import Job, Row, moment, wait_for
from vixml_jax.data import preprocessing
from vixml_jax.storage import digests

DISK_BYTES = 6 << 20


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
        self.command = [sys.executable, "-m", "vixml_jax.train"]
        self.command += [f"--{name}={value}" for name, value in flagged.items()]

    def start(self) -> subprocess.Popen:
        """Starts training and returns the process."""
        return subprocess.Popen(
            self.command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self) -> tuple[int, str]:
        """Trains until the process ends; returns its status and output."""
        process = self.start()
        output, _ = process.communicate()
        return process.returncode, output

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
        """All arrays of the newest checkpoint, by path."""
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


def kills(
    make: Callable[[], Run], expected: dict[str, np.ndarray], seconds: float, count: int, seed: int
) -> list[Row]:
    """Kills runs `count` times, half of them while they save, and resumes each to its end.

    A run that ends before it is killed does not count; another run is killed in its place.
    """
    rng = np.random.default_rng((seed, 0))
    killed = {"kill -9 at a random moment": 0, "kill -9 while it saves": 0}
    recovered = dict.fromkeys(killed, 0)
    lost, run, hits = [], make(), []

    def conclude() -> None:
        status, output = run.finish()
        damaged = os.path.exists(run.checkpoints + ".damaged")
        if status or damaged or not same(run.state(), expected):
            lost.append(output.strip().split("\n")[-1])
        else:
            for name in hits:
                recovered[name] += 1
        hits.clear()

    while sum(killed.values()) < count:
        saving = sum(killed.values()) % 2 == 1
        process = run.start()
        over = moment(rng, seconds)
        alive = wait_for(process, over)
        if alive and saving:
            alive = wait_for(process, run.is_saving)
            time.sleep(rng.uniform(0, 0.05))  # Anywhere within the write.
        process.kill()
        process.communicate()
        if not alive:  # Training was complete.
            conclude()
            run = make()
            continue
        name = "kill -9 while it saves" if saving else "kill -9 at a random moment"
        killed[name] += 1
        hits.append(name)
    conclude()
    note = "; ".join(lost) or "resumed to the same bits"
    return [Row(name, killed[name], recovered[name], note) for name in killed]


def stops(
    make: Callable[[], Run], expected: dict[str, np.ndarray], seconds: float, count: int, seed: int
) -> Row:
    """Sends SIGTERM to `count` runs, half of them while they save, and resumes them."""
    rng = np.random.default_rng((seed, 1))
    recovered, exit_s = 0, []
    ends = {"saved": 0, "nothing to save": 0, "complete": 0, "lost": 0}
    for number in range(count):
        run = make()
        process = run.start()
        killed_commands.wait_for_start(process)
        alive = wait_for(process, moment(rng, seconds))
        if alive and number % 2:
            wait_for(process, run.is_saving)
        then = time.monotonic()
        process.terminate()
        output, _ = process.communicate()
        status, line = process.returncode, output.strip().split("\n")[-1]
        saved = run.saved()
        how = "lost"
        if status == errors.PREEMPTED and "; to resume: " in line:
            exit_s.append(time.monotonic() - then)
            written = bool(saved) and f"saved at step {saved[-1]};" in line
            how = "saved" if written else "lost" if "saved at" in line else "nothing to save"
        elif status == 0:
            how = "complete"
        ends[how] += 1
        recovered += how != "lost" and run.finish()[0] == 0 and same(run.state(), expected)
    note = ", ".join(f"{name}: {times}" for name, times in ends.items() if times)
    return Row(
        "SIGTERM", count, recovered, f"{note}; {max(exit_s, default=0):.1f} s at most to exit"
    )


def damage(run: Run, expected: dict[str, np.ndarray]) -> Row:
    """Truncates the largest file of the newest checkpoint of a killed run, and resumes it."""
    process = run.start()
    wait_for(process, lambda: len(run.saved()) > 1 and run.saved()[-1] > 10)
    process.kill()
    process.communicate()
    newest = run.saved()[-1]
    top = os.path.join(run.checkpoints, str(newest))
    files = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
    largest = max(files, key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)
    status, output = run.finish()
    lines = [line for line in output.split("\n") if f"step {newest} is damaged" in line]
    aside = os.path.isdir(os.path.join(run.checkpoints + ".damaged", str(newest)))
    fine = status == 0 and len(lines) == 1 and aside and same(run.state(), expected)
    return Row("newest checkpoint truncated", 1, int(fine), lines[0] if lines else output[-200:])


def not_finite(run: Run) -> Row:
    """Trains at a learning rate at which nothing stays finite."""
    status, output = run.finish()
    line = output.strip().split("\n")[-1]
    finite = all(np.isfinite(x).all() for x in (run.state() if run.saved() else {}).values())
    fine = status == 1 and finite and "Traceback" not in output and "not finite" in line
    return Row("loss not finite", 1, int(fine), f"{status}: {line}")


def full_disk(make: Callable[[str], Run], expected: dict[str, np.ndarray], directory: str) -> Row:
    """Fills the disk of a run while it trains, frees it, and resumes the run."""
    name = "disk full"
    os.makedirs(directory)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        return Row(name, 0, 0, "skipped: only root can mount a tmpfs")
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
        output, _ = process.communicate()
        line = output.strip().split("\n")[-1]
        left = run.saved()
        newest, damaged = digests.newest_intact(run.checkpoints)
        os.remove(filler)
        fine = process.returncode == 2 and "Traceback" not in output and "No space left" in line
        fine = fine and bool(left) and newest == left[-1] and not damaged
        fine = fine and run.finish()[0] == 0 and same(run.state(), expected)
        return Row(name, 1, int(fine), f"{process.returncode}: {line}")
    finally:
        subprocess.run(["umount", directory], check=True, capture_output=True)


def make_jobs(directory: str) -> list[Job]:
    """The commands besides training, with earlier outputs of `prepare` and `export`."""
    os.makedirs(directory)
    raw = os.path.dirname(make_data(directory)) + "/raw"
    status, output = Run(f"{directory}/data", f"{directory}/run", **{"loop.epochs": 1}).finish()
    if status:
        raise RuntimeError(f"training ended with status {status}: {output}")
    with open(os.path.join(directory, "new.csv"), "w", encoding="utf-8") as file:
        file.write("id,text\nx1,label a0 b0\nx2,label b3\n")
    prepare = (f"--source={raw}", "--out={}/prepared", "--overwrite")
    export = ("--workdir={}/run", "--out={}/exported")
    for earlier in (
        Job("prepare", (*prepare, "--max_tokens=3"), "prepared"),  # Texts have 4.
        Job("export", (*export, "--notower", "--noprogram"), "exported"),
    ):
        killed_commands.undisturbed(earlier, directory)
    return [
        Job("prepare", (*prepare, "--max_tokens=8"), "prepared"),
        Job("evaluate", ("--workdir={}/run", "--report"), "run/evaluation", at_once=False),
        Job(
            "predict",
            ("--workdir={}/run", "--add_labels={}/new.csv"),
            "run/label_updates",
            done_before="'x1' exists already",
        ),
        Job("export", export, "exported"),
    ]


def inject_all(directory: str, *, num_kills: int, num_stops: int, seed: int) -> list[Row]:
    """Injects every fault, each into runs of its own below `directory`."""
    data = make_data(directory)
    count = iter(range(10**6))

    def make(**changes: Any) -> Run:
        return Run(data, os.path.join(directory, f"run{next(count)}"), **changes)

    # The first run fills the compilation cache; the second takes as long as later ones.
    for _ in range(2):
        run, then = make(), time.monotonic()
        status, output = run.finish()
        seconds = time.monotonic() - then
        if status:
            raise RuntimeError(f"the undisturbed run ended with status {status}: {output}")
    expected = run.state()
    print(f"an undisturbed run: {seconds:.1f} s, {run.saved()[-1]} steps", flush=True)
    template = os.path.join(directory, "jobs")
    jobs = make_jobs(template)
    each = num_kills // (len(jobs) + 1)
    rows = kills(make, expected, seconds, num_kills - each * len(jobs), seed)
    for job in jobs:
        rows.append(killed_commands.kills(job, template, each, seed))
        print(*rows[-1], flush=True)
    rows.append(stops(make, expected, seconds, num_stops, seed))
    rows.append(damage(make(), expected))
    rows.append(not_finite(make(**{"optimizer.learning_rate": 1e30})))
    rows.append(
        full_disk(lambda workdir: Run(data, workdir), expected, os.path.join(directory, "disk"))
    )
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        rows = inject_all(
            directory, num_kills=values.kills, num_stops=values.stops, seed=values.seed
        )
    print(f"{'fault':28s} {'times':>5s} {'recovered':>9s}")
    for row in rows:
        print(f"{row.fault:28s} {row.count:5d} {row.recovered:9d}  {row.note}")
    print(json.dumps([row._asdict() for row in rows]))
    if any(row.recovered < row.count for row in rows):
        sys.exit(1)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_integer("kills", 25, "Number of kills.", lower_bound=0)
    flags.DEFINE_integer("stops", 10, "Number of runs that get SIGTERM.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the times of the faults.", lower_bound=0)


if __name__ == "__main__":
    command_line.launch(main, define_flags)
