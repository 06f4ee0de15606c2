"""Weak scaling on host devices: equal work per device, on one to eight devices.

    python -m vixml_jax.benchmarks.scaling [--tower=all-minilm-l6] [--batch=32] [--rounds=5]

The devices share the cores, so N devices do N times the work of one in N times the time if the
program adds nothing. Time beyond that is overhead: collectives, gathered weights, smaller matrix
products, the host's work for each device. Each number of devices runs in a process of its own, in
turns, round after round.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.support import workers


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Compiles the step for all devices of this process and runs it once."""
    import jax

    from vixml_jax.benchmarks.memory import __main__ as memory
    from vixml_jax.benchmarks.support import steps
    from vixml_jax.parallel import collectives, sharding

    devices = jax.device_count()
    settings = {**settings, "batch": settings["batch"] * devices}
    parts = memory.build(settings)
    mesh = parts.model.mesh
    state = steps.fresh_state(parts, jax.random.key(0))
    batch = memory.random_batch(settings, devices)
    key = sharding.replicate(jax.random.key(0), mesh)
    program = parts.step.program(sharding.to_devices(batch, mesh), key)
    sent = sum(one.sent for one in collectives.collectives(program))

    def run() -> dict[str, Any]:
        nonlocal state
        begin = time.perf_counter()
        placed = sharding.to_devices(batch, mesh)
        host = time.perf_counter() - begin
        state, scalars = program(state, placed, key)
        jax.block_until_ready((state, scalars))
        return {"seconds": time.perf_counter() - begin, "host": host}

    run()
    return {programs[0]: ({"sent": sent}, run)}


def main(argv: Sequence[str]) -> None:
    """Prints one line for each number of devices."""
    del argv
    values = flags.FLAGS
    settings = {
        "tower": values.tower, "dtype": "float32", "length": 32, "batch": values.batch, "chunk": 0,
        "rank": 16,
    }  # fmt: skip
    running = {}
    for count in map(int, values.devices):
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        running[count] = workers.Worker(
            "vixml_jax.benchmarks.scaling", ["step"], settings, os.cpu_count()
        )
    seconds: dict[int, list[float]] = {count: [] for count in running}
    host: dict[int, list[float]] = {count: [] for count in running}
    for _ in range(values.rounds):
        for count, worker in running.items():
            found = worker.time("step")
            seconds[count].append(found["seconds"])
            host[count].append(found["host"])
    print(f"{values.tower}, {values.batch} queries and labels of 32 positions per device; "
          f"{os.cpu_count()} cores, median of {values.rounds} rounds")  # fmt: skip
    print("devices  s/step   x one device's work (min to max)        host, ms   sent/device, MB")
    first = next(iter(running))
    for count, worker in running.items():
        ratios = [
            a / (b * count / first) for a, b in zip(seconds[count], seconds[first], strict=True)
        ]
        about = worker.about["step"]
        typical, work = statistics.median(seconds[count]), statistics.median(ratios)
        print(
            f"{count:7d} {typical:9.2f} {work:16.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"{1e3 * statistics.median(host[count]):18.1f} {about['sent'] / 1e6:14.1f}"
        )
        worker.close()


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by the start of its name.")
    flags.DEFINE_integer("batch", 32, "Queries per device, and labels per device.", lower_bound=8)
    flags.DEFINE_list(
        "devices", ["1", "2", "4", "8"], "Numbers of devices; the first is the reference."
    )
    flags.DEFINE_integer("rounds", 5, "Rounds, with all numbers of devices in turn.", lower_bound=1)


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
