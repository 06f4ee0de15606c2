"""Processes of a run: start-up, joint exit on failure, barriers, broadcasts and exchange of arrays.

With a single process none of the functions communicates.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.parallel import visible_devices
from vixml_jax.structs import Shard

_FAILURE_KEY = "vixml_jax/failed"  # Key under which the first failure is reported.
_HEARTBEAT_TIMEOUT_S = 30  # A process silent for this long counts as dead; the others then exit.
_POLL_MS = 1000  # Duration of one wait for a failure report.
_MAX_BYTES = 16 << 20  # Bytes that a process receives at a time.
_REPORT_GRACE_S = 2.0  # Time the others have to read a report, before process 0 exits.


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags by which a command finds the other processes of its run."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "Address of the first process of the run, HOST:PORT; 'auto' takes it from the TPU pod, "
        "Slurm, Kubernetes or MPI; empty for a single process.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Number of processes of the run, for --coordinator=HOST:PORT.",
        lower_bound=1,
        upper_bound=1 << 20,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_index",
        None,
        "Index of this process, from 0, for --coordinator=HOST:PORT.",
        lower_bound=0,
        upper_bound=1 << 20,
        flag_values=values,
    )


def start(coordinator: str, num_processes: int | None, process_index: int | None) -> None:
    """Joins the other processes of the run; must be called before any other use of JAX.

    Afterwards only process 0 prints and shows progress, and all processes exit if one fails.

    Args:
      coordinator: Value of `--coordinator`.
      num_processes: Value of `--num_processes`.
      process_index: Value of `--process_index`.

    Raises:
      InputError: If the flags contradict each other, the processes of a machine cannot share its
        GPUs evenly, or the processes cannot be connected.
    """
    explicit = ":" in coordinator
    numbered = num_processes is not None and process_index is not None
    if explicit != numbered or (not explicit and (num_processes, process_index) != (None, None)):
        raise InputError(
            f"--coordinator={coordinator} with --num_processes={num_processes} and "
            f"--process_index={process_index}: --coordinator=HOST:PORT needs both numbers; leave "
            "both out with 'auto' or a single process"
        )
    if not coordinator:
        return
    if explicit and not 0 <= process_index < num_processes:
        raise InputError(
            f"--process_index={process_index}: expected 0 to {num_processes - 1}, because of "
            f"--num_processes={num_processes}"
        )
    if not explicit and coordinator != "auto":
        raise InputError(f"--coordinator={coordinator}: expected HOST:PORT or 'auto'")
    # Also for HOST:PORT: JAX reads the variables of Slurm and MPI for it, too.
    devices = visible_devices.local_device_ids(os.environ)
    try:
        jax.distributed.initialize(
            *((coordinator, num_processes, process_index) if explicit else ()),
            local_device_ids=devices,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator={coordinator}: {error}") from None
    if jax.process_index():
        # Redirects the file descriptor, not sys.stdout: Gloo prints from C++.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.environ["TQDM_DISABLE"] = "1"
    errors.report_failure = _report_failure
    done = threading.Event()
    watcher = threading.Thread(target=_watch_for_failures, args=(done,), daemon=True)
    watcher.start()

    def stop_watching() -> None:
        done.set()
        watcher.join()

    # Exit handlers run in reverse order, so this one runs before JAX disconnects.
    atexit.register(stop_watching)


def _client() -> object:
    # JAX has no public API for the key-value store of jax.distributed yet.
    from jax._src import distributed

    return distributed.global_state.client


def _report_failure(line: str, status: int) -> None:
    """Reports why this process fails, unless another one failed before, and exits."""
    index = jax.process_index()
    with contextlib.suppress(Exception):  # The key exists if another process failed before.
        _client().key_value_set(_FAILURE_KEY, json.dumps([index, line, status]))
    if index == 0:
        time.sleep(_REPORT_GRACE_S)
    sys.stderr.flush()
    # Python's normal exit would wait for processes that wait for this one.
    os._exit(status)


def _watch_for_failures(done: threading.Event) -> None:
    """Exits this process once another one has reported a failure; process 0 prints the report."""
    while not done.is_set():
        try:
            report = _client().blocking_key_value_get(_FAILURE_KEY, _POLL_MS)
        except Exception:  # Timed out: no process has failed so far.
            continue
        failed, line, status = json.loads(report)
        if failed == jax.process_index():
            return
        if jax.process_index() == 0:
            # In one write, so that a line of another thread does not land within it.
            sys.stderr.write(f"process {failed}: {line}\n")
            sys.stderr.flush()
            time.sleep(_REPORT_GRACE_S)
        os._exit(status)


def barrier(name: str) -> None:
    """Returns once all processes have called it with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def broadcast_from_first(value: int) -> int:
    """The value of process 0; all processes must call it together."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Runs the block on process 0, then on the others, which find the files it has made."""
    if jax.process_index():
        barrier(name)
    yield
    if not jax.process_index():
        barrier(name)


class Group(Protocol):
    """A group of processes; all must call its methods together, in the same order.

    Attributes:
      index: Index of this process, from 0.
      count: Number of processes.
    """

    index: int
    count: int

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        """The arrays of all processes, by process index; their first dimensions may differ.

        Args:
          x: Array of this process.
          rows: First dimension of each process's array, if known; saves one exchange.
        """

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Sends `parts[p]` to process p; returns the arrays sent to this process."""


class _SingleProcess:
    """A group of one process."""

    index, count = 0, 1

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        del rows
        return [x]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        return parts


class _World:
    """All processes of `jax.distributed`.

    Arrays are sent as bytes from device to device, in chunks that bound the memory needed.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        first_device = {}
        for device in jax.devices():
            first_device.setdefault(device.process_index, device)
        self._mesh = Mesh(np.array([first_device[p] for p in range(self.count)]), ("process",))
        self._sharding = NamedSharding(self._mesh, P("process"))

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        if rows is None:
            rows = self._run(np.array([len(x)], np.int32), "gather")[:, 0]
        sent, width = _as_bytes(x), _row_bytes(x)
        received = [np.empty(int(num) * width, np.uint8) for num in rows]
        longest = max(map(len, received))
        for start, size in _chunks(longest, _MAX_BYTES // self.count):
            chunks = self._run(_padded(sent[start : start + size], size), "gather")
            _store(received, chunks, start)
        return [_from_bytes(array, x) for array in received]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        lengths = np.array([len(part) for part in parts], np.int32)
        rows, width = self._run(lengths, "gather"), _row_bytes(parts[0])  # [from, to]
        sent = [_as_bytes(part) for part in parts]
        received = [np.empty(int(num) * width, np.uint8) for num in rows[:, self.index]]
        for start, size in _chunks(int(rows.max()) * width, _MAX_BYTES // self.count):
            chunks = np.stack([_padded(part[start : start + size], size) for part in sent])
            _store(received, self._run(chunks, "exchange")[0], start)
        return [_from_bytes(array, parts[0]) for array in received]

    def _run(self, x: np.ndarray, program: str) -> np.ndarray:
        """Runs a program on the array whose rows are each process's `x`; returns the local part.

        "gather" returns all rows [process, ...]; "exchange" returns column `index`, [1, process,
        ...].
        """
        rows = jax.make_array_from_callback(
            (self.count, *x.shape), self._sharding, lambda index: x[None]
        )
        result = self._programs[program](rows)
        return np.asarray(result.addressable_shards[0].data)

    @functools.cached_property
    def _programs(self) -> dict[str, object]:
        replicated = NamedSharding(self._mesh, P())
        return {
            "gather": jax.jit(lambda x: x, out_shardings=replicated),
            "exchange": jax.jit(lambda x: x.swapaxes(0, 1), out_shardings=self._sharding),
        }


def _as_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _row_bytes(x: np.ndarray) -> int:
    return x.itemsize * math.prod(x.shape[1:])


def _chunks(size: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Start and length of chunks that cover `size` bytes.

    Lengths are powers of two, because each length needs a compiled program.
    """
    length = min(1 << max(10, (size - 1).bit_length()), 1 << at_most.bit_length() - 1)
    return ((start, length) for start in range(0, size, length))


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, (0, size - len(x)))


def _store(arrays: list[np.ndarray], chunks: np.ndarray, start: int) -> None:
    """Copies one chunk into each array at `start`, without the chunks' padding."""
    for array, chunk in zip(arrays, chunks, strict=True):
        array[start : start + len(chunk)] = chunk[: max(0, len(array) - start)]


def _from_bytes(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.view(like.dtype).reshape(-1, *like.shape[1:])


ALONE: Group = _SingleProcess()


def world() -> Group:
    """The group of all processes of this run."""
    return _World() if jax.process_count() > 1 else ALONE


def gather_rows(shard: Shard, num_rows: int, group: Group) -> Float[np.ndarray, "n e"]:
    """All rows, on every process, from each process's shard; a single process gets no copy."""
    if group.count == 1:
        return shard.values
    rows = np.empty((num_rows, *shard.values.shape[1:]), shard.values.dtype)
    for ids, values in zip(group.gather(shard.ids), group.gather(shard.values), strict=True):
        rows[ids] = values
    return rows
