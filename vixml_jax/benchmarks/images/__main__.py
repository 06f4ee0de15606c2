"""Images that are read, decoded and resized in a second, by one thread, threads and processes.

    python -m vixml_jax.benchmarks.images

Programs take turns in one run. Processes have one thread each and share nothing, so that they are
what threads could reach without Python's lock. Seconds of processors per image tell a lock from a
machine that is busy with other work: they stay the same where processors are merely shared.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence

from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.images import decoding
from vixml_jax.runtime import processors


def main(argv: Sequence[str]) -> None:
    """Prints images per second, milliseconds of processors per image, and ratios to one thread."""
    del argv
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        paths = decoding.write_files(directory, values.files, values.side)
        size = sum(map(os.path.getsize, paths)) / len(paths) / 1000
        found = decoding.compare(paths, values.frame, values.workers, values.rounds)
    median: Callable = statistics.median
    print(
        f"{len(paths)} JPEG files of {values.side} x {values.side} pixels, {size:.0f} kB each, to "
        f"{values.frame} x {values.frame}; median of {values.rounds} rounds; load "
        f"{os.getloadavg()[0]:.1f} on {processors.usable()} cores"
    )
    print(f"{'program':14s} {'images/s':>9s} {'processor ms/image':>19s}  times 1 thread")
    for name, rounds in found.items():
        ratios = [one[0] / own[0] for one, own in zip(found[decoding.ONE], rounds, strict=True)]
        print(
            f"{name:14s} {len(paths) / median([x for x, _ in rounds]):9.1f} "
            f"{1000 * median([x for _, x in rounds]) / len(paths):19.2f}  {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_integer("files", 160, "Number of files.", lower_bound=1)
    flags.DEFINE_integer("side", 640, "Side of the images in pixels.", lower_bound=2)
    flags.DEFINE_integer("frame", 224, "Side of the vision model's frame.", lower_bound=1)
    flags.DEFINE_integer("workers", 2, "Threads, and processes.", lower_bound=2)
    flags.DEFINE_integer("rounds", 7, "Rounds of each program.", lower_bound=1)


if __name__ == "__main__":
    command_line.launch(main, define_flags)
