"""The processes of one run: how they find each other, what they do together, and that all of them
leave when one fails. Alone, nothing is exchanged."""

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
from vixml_jax.structs import Share

_FAILED = "vixml_jax/failed"  # Key under which the first to fail says why.
_GONE_S = 30  # A process not heard of for so long is taken for dead, and ends the others.
_LISTEN_MS = 1000  # For word of a failure, at a time.
_UNDER_WAY = 16 << 20  # Bytes that a process gets from the others at a time.
_FAREWELL_S = 2.0  # What the others have to hear why, before the first process hangs up.


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """How a door finds the other processes of its run."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "Where the processes of a run meet: HOST:PORT of the first one; 'auto': as the TPU pod, "
        "Slurm, Kubernetes or MPI says; empty: there is one process.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many there are; for HOST:PORT.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_index", None, "Which of them this is, from 0; for HOST:PORT.", flag_values=values
    )


def start(coordinator: str, num_processes: int | None, process_index: int | None) -> None:
    """Joins the other processes, before anything else is done with JAX. From then on only the first
    one prints and shows bars, and all leave when one fails.

    Raises:
      InputError: If the flags contradict each other, or nobody says who the others are.
    """
    by_hand = ":" in coordinator
    told = num_processes is not None and process_index is not None
    if by_hand != told or (not by_hand and (num_processes, process_index) != (None, None)):
        raise InputError(
            f"--coordinator={coordinator} with --num_processes={num_processes} and "
            f"--process_index={process_index}: HOST:PORT needs both, 'auto' and one process neither"
        )
    if not coordinator:
        return
    if by_hand and not 0 <= process_index < num_processes:
        raise InputError(
            f"--process_index={process_index}: expected 0 to {num_processes - 1}, as "
            f"--num_processes={num_processes} says"
        )
    if not by_hand and coordinator != "auto":
        raise InputError(f"--coordinator={coordinator}: expected HOST:PORT or 'auto'")
    try:
        jax.distributed.initialize(
            *((coordinator, num_processes, process_index) if by_hand else ()),
            heartbeat_timeout_seconds=_GONE_S,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator={coordinator}: {error}") from None
    if jax.process_index():
        # The file itself, not Python's name for it: Gloo prints too.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.environ["TQDM_DISABLE"] = "1"
    errors.tell_others = _tell
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(over,), daemon=True)
    listener.start()

    def hang_up() -> None:
        over.set()
        listener.join()

    atexit.register(hang_up)  # Before JAX, which came first, hangs up.


def _client() -> object:
    # The store of keys that jax.distributed has has no public name yet.
    from jax._src import distributed

    return distributed.global_state.client


def _tell(line: str, status: int) -> None:
    """Says why this process fails, if it is the first, and ends it."""
    me = jax.process_index()
    with contextlib.suppress(Exception):  # Another one was first: that is what all show.
        _client().key_value_set(_FAILED, json.dumps([me, line, status]))
    if me == 0:
        time.sleep(_FAREWELL_S)
    sys.stderr.flush()
    # Not through the exit of Python: that would wait for those who wait for this one.
    os._exit(status)


def _listen(over: threading.Event) -> None:
    while not over.is_set():
        try:
            found = _client().blocking_key_value_get(_FAILED, _LISTEN_MS)
        except Exception:  # Nobody failed so far.
            continue
        who, line, status = json.loads(found)
        if who == jax.process_index():
            return
        if jax.process_index() == 0:
            print(f"process {who}: {line}", file=sys.stderr, flush=True)
            time.sleep(_FAREWELL_S)
        os._exit(status)


def meet(where: str) -> None:
    """Returns when all processes came here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def first_says(value: int) -> int:
    """What process 0 says, in all processes, which come here together."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The block is run by the first process, then by the others: who find what it made."""
    if jax.process_index():
        meet(what)
    yield
    if not jax.process_index():
        meet(what)


class Group(Protocol):
    """Processes that call each method together, in the same order.

    Attributes:
      index: Of this process, from 0.
      count: Of processes.
    """

    index: int
    count: int

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        """The array of each process, in order; their first dimensions may differ.

        Args:
          x: What this process gives.
          rows: The length of each array where all know it: that saves asking.
        """

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Sends `parts[p]` to process p; returns what each process sent to this one."""


class _Alone:
    """A group of one."""

    index, count = 0, 1

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        del rows
        return [x]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        return parts


class _World:
    """All processes of `jax.distributed`: arrays travel as bytes, from device to device, so many at
    a time that what is on its way stays small."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        firsts = {}
        for device in jax.devices():
            firsts.setdefault(device.process_index, device)
        self._mesh = Mesh(np.array([firsts[p] for p in range(self.count)]), ("process",))
        self._place = NamedSharding(self._mesh, P("process"))

    def gather(self, x: np.ndarray, rows: Sequence[int] | None = None) -> list[np.ndarray]:
        if rows is None:
            rows = self._run(np.array([len(x)], np.int32), "gather")[:, 0]
        mine, width = _as_bytes(x), _row_bytes(x)
        found = [np.empty(int(num) * width, np.uint8) for num in rows]
        longest = max(map(len, found))
        for start, size in _pieces(longest, _UNDER_WAY // self.count):
            got = self._run(_padded(mine[start : start + size], size), "gather")
            for whole, piece in zip(found, got, strict=True):
                whole[start : start + size] = piece[: max(0, len(whole) - start)]
        return [_from_bytes(whole, x) for whole in found]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        given = np.array([len(part) for part in parts], np.int32)
        rows, width = self._run(given, "gather"), _row_bytes(parts[0])  # [from, to]
        mine = [_as_bytes(part) for part in parts]
        found = [np.empty(int(num) * width, np.uint8) for num in rows[:, self.index]]
        for start, size in _pieces(int(rows.max()) * width, _UNDER_WAY // self.count):
            sent = np.stack([_padded(part[start : start + size], size) for part in mine])
            for whole, piece in zip(found, self._run(sent, "exchange")[0], strict=True):
                whole[start : start + size] = piece[: max(0, len(whole) - start)]
        return [_from_bytes(whole, parts[0]) for whole in found]

    def _run(self, x: np.ndarray, what: str) -> np.ndarray:
        """A row of each process in; all of them, or a column, out."""
        spread = jax.make_array_from_callback(
            (self.count, *x.shape), self._place, lambda at: x[None]
        )
        found = self._programs[what](spread)
        return np.asarray(found.addressable_shards[0].data)

    @functools.cached_property
    def _programs(self) -> dict[str, object]:
        whole = NamedSharding(self._mesh, P())
        return {
            "gather": jax.jit(lambda x: x, out_shardings=whole),
            "exchange": jax.jit(lambda x: x.swapaxes(0, 1), out_shardings=self._place),
        }


def _as_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _row_bytes(x: np.ndarray) -> int:
    return x.itemsize * math.prod(x.shape[1:])


def _pieces(size: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Start and length of pieces that cover `size` bytes. Lengths are powers of two: for each there
    is a program to compile."""
    length = min(1 << max(10, (size - 1).bit_length()), 1 << at_most.bit_length() - 1)
    return ((start, length) for start in range(0, size, length))


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, (0, size - len(x)))


def _from_bytes(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.view(like.dtype).reshape(-1, *like.shape[1:])


ALONE: Group = _Alone()


def world() -> Group:
    """All processes of this run."""
    return _World() if jax.process_count() > 1 else ALONE


def whole(share: Share, num_rows: int, group: Group) -> Float[np.ndarray, "n e"]:
    """All rows, on every process, from what each of them keeps; alone, they are not copied."""
    if group.count == 1:
        return share.values
    rows = np.empty((num_rows, *share.values.shape[1:]), share.values.dtype)
    for ids, values in zip(group.gather(share.ids), group.gather(share.values), strict=True):
        rows[ids] = values
    return rows
