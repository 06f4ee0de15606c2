"""Decodes image files by one thread, threads and processes in turns."""

import os
import time
from collections.abc import Sequence
from concurrent import futures
from multiprocessing import get_context

import numpy as np

from vixml_jax.data.images import image_files

ONE = "1 thread"
_COARSE = 16  # Pixels of a file for each random value, so that it compresses as photos do.


def write_files(directory: str, count: int, side: int) -> list[str]:
    """Writes JPEG files of smooth random colours, `side` x `side` pixels; returns their paths."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        coarse = rng.integers(0, 256, (max(2, side // _COARSE),) * 2 + (3,), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        paths.append(os.path.join(directory, f"{number}.jpg"))
        image.save(paths[-1], quality=90)
    return paths


def decode(paths: Sequence[str], frame: int) -> float:
    """Decodes files as `prepare` does, for a vision model of `frame` x `frame` pixels.

    Returns:
      Seconds of processors that this thread took.
    """
    half = (0.5, 0.5, 0.5)
    processor = image_files.ImageProcessor(frame, frame, 3, 1 / 255, half, half)
    before = time.thread_time()
    for path in paths:
        image_files.load_pixels(path, processor)
    return time.thread_time() - before


def compare(paths: Sequence[str], frame: int, workers: int, rounds: int) -> dict[str, list]:
    """Times all programs in turn.

    Args:
      paths: Files, which each program decodes once a round.
      frame: Side of the frame that images are resized to.
      workers: Number of threads, and of processes.
      rounds: Rounds of each program.

    Returns:
      (seconds, seconds of processors) of each round, by program.
    """
    many = {f"{workers} threads": futures.ThreadPoolExecutor(workers)}
    many[f"{workers} processes"] = futures.ProcessPoolExecutor(workers, get_context("spawn"))
    pools: dict[str, futures.Executor] = {ONE: futures.ThreadPoolExecutor(1)} | many
    tasks = [paths[start : start + 4] for start in range(0, len(paths), 4)]

    def run(pool: futures.Executor) -> tuple[float, float]:
        start = time.perf_counter()
        used = sum(pool.map(decode, tasks, [frame] * len(tasks)))
        return time.perf_counter() - start, used

    for pool in pools.values():  # Starts processes, imports Pillow, reads the files once.
        run(pool)
    found: dict[str, list] = {name: [] for name in pools}
    for _ in range(rounds):
        for name, pool in pools.items():
            found[name].append(run(pool))
    for pool in pools.values():
        pool.shutdown()
    return found
