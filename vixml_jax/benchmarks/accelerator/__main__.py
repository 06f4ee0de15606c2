"""Checks and measures an accelerator: the first command to run on a new kind of device.

    python -m vixml_jax.benchmarks.accelerator --out=DIR [--size=tiny] [--parts=doctor,parity]

It takes about ten minutes on one GPU, and runs on a CPU, too. Each part is a process of its own,
so that one which fails or hangs does not end the others. Its result is written to DIR/results.json
and DIR/results.md as it ends, its output to DIR/NAME.log. The same command, run again, goes on with
the parts that are missing or have failed. The status is 1 if a part has failed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.accelerator import parts, results
from vixml_jax.benchmarks.accelerator.results import Part
from vixml_jax.benchmarks.support import platforms
from vixml_jax.errors import InputError
from vixml_jax.storage import locks

_MODULE = "vixml_jax.benchmarks.accelerator"
_ROWS = '{"rows":'  # How the last line of a part that has ended begins.


def run(name: str, settings: dict[str, Any], directory: str, *, timeout_s: float) -> Part:
    """Runs a part in a process of its own.

    Args:
      name: A key of `parts.PARTS`.
      settings: See `parts`.
      directory: For the log.
      timeout_s: A part that takes longer fails.
    """
    log = f"{name}.log"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    platforms_asked = environment.get("JAX_PLATFORMS", "")
    if platforms_asked and "cpu" not in platforms_asked:  # The reference of the parity checks.
        environment["JAX_PLATFORMS"] += ",cpu"
    command = [sys.executable, "-m", _MODULE, "--part", name, json.dumps(settings)]
    start = time.monotonic()
    with open(os.path.join(directory, log), "w+b") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        late = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # With all processes that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        said = file.read().decode(errors="replace").splitlines()
    seconds = time.monotonic() - start
    rows = []
    if said and said[-1].startswith(_ROWS):
        rows = msgspec.json.decode(said[-1], type=dict[str, list[results.Row]])["rows"]
    if late:
        error = f"did not end within {timeout_s:.0f} s"
    elif process.returncode:
        error = error_line(said) or f"ended with status {process.returncode}"
    else:
        error = results.failed_checks(rows)
    return Part("failed" if error else "done", seconds, rows, error, log)


def error_line(said: Sequence[str]) -> str:
    """The error that a part printed: that of its first traceback, or else its last line."""
    first = next((i for i, line in enumerate(said) if line.startswith("Traceback (most")), None)
    if first is not None:
        # The frames of a traceback are indented; the error follows them.
        said = [line for line in said[first + 1 :] if line and not line.startswith((" ", "-"))][:1]
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1][:500] if lines else ""


def main(argv: Sequence[str]) -> None:
    """Runs the parts whose results are missing, and prints them."""
    del argv
    values = flags.FLAGS
    for name in values.parts:
        if name not in parts.PARTS:
            raise InputError(f"--parts={name}: expected some of {', '.join(parts.PARTS)}")
    if not values.out:
        raise InputError("--out is missing: the directory of the results")
    found = platforms.describe()
    about = {
        "size": values.size,
        "data": values.data,
        "devices": f"{found.count} x {found.kind} ({found.name})",
        "versions": command_line.version(),
    }
    settings = {"size": values.size, "data": values.data, "device": found.name}
    settings["threads"] = len(os.sched_getaffinity(0))
    os.makedirs(values.out, exist_ok=True)
    with locks.exclusive(values.out, doing="measuring an accelerator"):
        gathered = results.open_results(values.out, about)
        for name in values.parts:
            part = gathered.parts.get(name)
            if part is not None and part.state == "done":
                print(f"{name}: done before", flush=True)
                continue
            part = run(name, settings, values.out, timeout_s=values.timeout_s)
            # In the order of the table, whatever the order of the calls.
            known = {**gathered.parts, name: part}
            gathered.parts = {key: known[key] for key in parts.PARTS if key in known}
            results.write(values.out, gathered)
            print(f"{name}: {part.state} in {part.seconds:.0f} s {part.error}".rstrip(), flush=True)
    print("\n" + results.markdown(gathered))
    if any(gathered.parts[name].state == "failed" for name in values.parts):
        sys.exit(1)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("out", "", "Directory of the results, which a second call completes.")
    flags.DEFINE_enum(
        "size", "full", list(parts.SIZES), "full: for an accelerator; tiny: seconds on a CPU."
    )
    flags.DEFINE_list("parts", list(parts.PARTS), "Parts to run, separated by commas.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are used, or 'glyphs'.")
    flags.DEFINE_float(
        "timeout_s", 900.0, "Seconds after which a part has failed.", lower_bound=1.0
    )


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--part":
        rows = parts.PARTS[sys.argv[2]](json.loads(sys.argv[3]))
        print("\n" + _ROWS + msgspec.json.encode(rows).decode() + "}", flush=True)
    else:
        command_line.launch(main, define_flags, resumable=True)
