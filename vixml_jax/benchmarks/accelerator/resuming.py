"""A training run that is killed and started again, and what it leaves."""

import os
import sys
import tempfile
import time
from typing import Any

from vixml_jax.benchmarks import fault_injection
from vixml_jax.benchmarks.accelerator.results import Row, is_true
from vixml_jax.benchmarks.support import killed_commands
from vixml_jax.storage import json_files


class Quickstart(fault_injection.Run):
    """The run of the quickstart, for few epochs."""

    def __init__(self, workdir: str):
        super().__init__("glyphs", workdir)
        self.command = [sys.executable, "-m", "vixml_jax.train", "--preset=quickstart"]
        self.command += [f"--workdir={workdir}", "--loop.epochs=12", "--loop.save_every=2"]


def resume(settings: dict[str, Any]) -> list[Row]:
    """Kills a run once it has saved a checkpoint, resumes it, and compares it with another run."""
    with tempfile.TemporaryDirectory() as directory:

        def make(name: str) -> fault_injection.Run:
            workdir = os.path.join(directory, name)
            if settings["size"] == "full":
                return Quickstart(workdir)
            return fault_injection.Run(data, workdir)

        data = "" if settings["size"] == "full" else fault_injection.make_data(directory)
        undisturbed, killed = make("undisturbed"), make("killed")
        start = time.monotonic()
        status, output = undisturbed.finish()
        seconds = time.monotonic() - start
        if status:
            raise RuntimeError(f"training ended with status {status}: {output[-2000:]}")
        process = killed.start()
        alive = killed_commands.wait_for(process, lambda: bool(killed.saved()))
        process.kill()
        process.communicate()
        saved = killed.saved()[-1] if killed.saved() else 0
        status, output = killed.finish()
        print(output)
        if status:
            raise RuntimeError(f"the resumed run ended with status {status}: {output[-2000:]}")
        last, equal = killed.saved()[-1], False
        if last == undisturbed.saved()[-1]:
            equal = fault_injection.same(killed.state(), undisturbed.state())
        rows = [
            Row("seconds of a run with its start and its evaluation", seconds),
            is_true("killed after a checkpoint and before the end", alive and 0 < saved < last),
            is_true("resumed from the checkpoint", f"resumed at step {saved} " in output),
        ]
        bits = is_true("bits of the final state as in an undisturbed run", equal)
        if settings["device"] == "gpu":  # Promised for other devices.
            bits = Row(bits.what, bits.value)
        return [*rows, bits, *_metrics(undisturbed, killed)]


def _metrics(undisturbed: fault_injection.Run, killed: fault_injection.Run) -> list[Row]:
    """P@1 of both runs on the test queries."""
    found = []
    for run in (undisturbed, killed):
        path = os.path.join(run.workdir, "evaluation", "test-exact.json")
        content = json_files.read(path, dict[str, Any], "run the part again")
        found.append(float(content["P@1"]))
    return [
        Row("P@1 of the undisturbed run", found[0]),
        Row("P@1 of the resumed run", found[1], f"about {found[0]:.4g}"),
    ]
