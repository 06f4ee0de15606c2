"""Mesh and rules: the only place that knows both the logical axes and the mesh."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from vixml_jax.parallel import axis_names
from vixml_jax.structs import Share

MESH_AXES = ("replica", "fsdp", "tensor")  # Slowest link first.
ROWS = ("replica", "fsdp")  # What rows of batches, banks and tables are spread over.

AXIS_RULES = (
    ("batch", ROWS),
    ("looked_up", "replica"),
    ("label", ROWS),
    ("embed", "fsdp"),
    ("rank", "fsdp"),  # Where no width is.
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)


class Stored(NamedTuple):
    """What an array is stored as."""

    shape: tuple[int, ...]
    sharding: NamedSharding


def create_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over devices, None: all; one size may be -1 and takes what the others leave.

    Raises:
      ValueError: If the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        asked = ",".join(f"{name}:{n}" for name, n in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"{asked} is for {int(np.prod(sizes))} devices, found {len(devices)} "
            f"({devices[0].device_kind}): choose sizes whose product is {len(devices)}, or -1 for "
            "one of them"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def num_row_shards(mesh: Mesh) -> int:
    """Over how many devices rows are spread."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def num_shares(mesh: Mesh, recorded: int = 8) -> int:
    """In how many shares a run packs its batches.

    Dropout is drawn by places in packed rows. As many shares on any number of devices make it the
    same run.

    Args:
      mesh: Its row shards divide the number.
      recorded: What a run began with; a multiple of it where the mesh does not divide it.
    """
    return math.lcm(recorded, num_row_shards(mesh))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows spread over (replica, fsdp), all else whole."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def pad_rows(num_rows: int, mesh: Mesh) -> int:
    """The next multiple of the row shards: how many rows a spread table has."""
    return _multiple(num_rows, num_row_shards(mesh))


def boxed(value: Any, letters: str) -> nn.LogicallyPartitioned:
    """An array, abstract or not, with the logical axes of its letters (see `axes.LETTERS`)."""
    return nn.LogicallyPartitioned(value, axis_names.logical(letters))


def sharding_of(names: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """The sharding of an array, by the logical axis of each dimension."""
    return NamedSharding(mesh, P(*nn.logical_to_mesh_axes(tuple(names), AXIS_RULES)))


def stored(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh) -> Stored:
    """What an array is stored as: its shape, each dimension padded so that its axis divides it.

    Args:
      shape: Logical, as a module declares it.
      names: Logical axis of each dimension.
      mesh: Where it lies.
    """
    place = sharding_of(names, mesh)
    shards = [1 if axis is None else _axis_size(mesh, axis) for axis in place.spec]
    return Stored(tuple(map(_multiple, shape, shards)), place)


def stored_tree(boxed: Any, mesh: Mesh) -> Any:
    """What each array of a tree is stored as, abstract: padded shape, dtype, sharding.

    Args:
      boxed: What `jax.eval_shape` of a Linen `init` gives, with logical axes; without them an array
        lies whole on every device.
      mesh: Where to place it.
    """

    def one(x: Any) -> jax.ShapeDtypeStruct:
        shape, place = stored(nn.unbox(x).shape, _names_of(x), mesh)
        return jax.ShapeDtypeStruct(shape, nn.unbox(x).dtype, sharding=place)

    return jax.tree.map(one, boxed, is_leaf=_is_boxed)


def pad(tree: Any, like: Any) -> Any:
    """Arrays of logical shapes with zeros at their ends, as long as those of `like`."""

    def one(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        missing = [(0, b - a) for a, b in zip(x.shape, like.shape, strict=True)]
        return jnp.pad(x, missing) if x.shape != like.shape else x

    return jax.tree.map(one, tree, like)


def unpad(tree: Any, boxed: Any) -> Any:
    """Stored arrays cut to their logical shapes; what is not padded is passed on as it is.

    The zeros that are cut off stay zeros under any optimizer that leaves a zero of zero gradient
    alone (AdamW with decay does).
    """

    def one(x: jax.Array, logical: Any) -> jax.Array:
        cut = x.shape != logical.shape
        return jax.lax.slice(x, [0] * x.ndim, logical.shape) if cut else x

    return jax.tree.map(one, tree, nn.unbox(boxed))


def describe_padding(boxed: Any, mesh: Mesh) -> list[str]:
    """One line for each dimension that is stored padded: which, from, to, why, and where."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_boxed):
        shape, place = stored(x_shape := nn.unbox(x).shape, _names_of(x), mesh)
        for name, axis, size, longer in zip(_names_of(x), place.spec, x_shape, shape, strict=True):
            if size != longer:
                found.setdefault((name, axis, size, longer), []).append(path_name(path))
    lines = []
    for (name, axis, size, longer), where in found.items():
        along = (axis,) if isinstance(axis, str) else axis
        why = " x ".join(f"{axis}:{mesh.shape[axis]}" for axis in along)
        others = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines.append(
            f"padded: {name} from {size} to {longer}, a multiple of {why}, in {where[0]}{others}"
        )
    return lines


def path_name(path: tuple[Any, ...]) -> str:
    """Names of a leaf's branches with slashes between them; numbers of tuples are left out."""
    names = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return "/".join(name for name in names if isinstance(name, str))


def _is_boxed(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _names_of(x: Any) -> tuple[str | None, ...]:
    return x.names if _is_boxed(x) else (None,) * len(x.shape)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _axis_size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return int(np.prod([mesh.shape[name] for name in names]))


@contextlib.contextmanager
def laid_out(mesh: Mesh) -> Iterator[None]:
    """Inside, modules keep their activations spread over the mesh as `AXIS_RULES` say.

    Linen drops the constraints, without a word, where it finds no mesh or no rules.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(AXIS_RULES):
        yield


def row_shards(mesh: Mesh, process: int | None = None, *, kept: bool = False) -> list[int]:
    """The row shards that lie on a process's devices, ascending.

    Args:
      mesh: Over the devices of all processes.
      process: None: this one.
      kept: Of shards that several processes hold (a tensor axis may span them), those alone that
        are this one's to keep, so that all processes together keep each shard once.
    """
    process = jax.process_index() if process is None else process
    owners = _owners(mesh)
    mine = owners[:, 0] == process if kept else (owners == process).any(axis=1)
    return np.flatnonzero(mine).tolist()


@functools.cache  # Every array of every batch asks.
def _owners(mesh: Mesh) -> Int[np.ndarray, "shards tensor"]:
    """The process of each device, by row shard."""
    owners = [device.process_index for device in mesh.devices.flat]
    return np.array(owners).reshape(num_row_shards(mesh), -1)


def row_ids(
    num_rows: int, mesh: Mesh, process: int | None = None, *, kept: bool = False
) -> Int[np.ndarray, " m"]:
    """The rows of a spread array of `num_rows`, without padding, of `row_shards`; ascending."""
    each = pad_rows(num_rows, mesh) // num_row_shards(mesh)
    shards = np.array(row_shards(mesh, process, kept=kept), np.int64)
    ids = (shards[:, None] * each + np.arange(each)).reshape(-1)
    return ids[ids < num_rows]


def spread_rows(share: Share, num_rows: int, mesh: Mesh) -> jax.Array:
    """An array spread over (replica, fsdp), zero rows at its end, from the rows of each process.

    Args:
      share: The rows of `row_ids(num_rows, mesh)` at least.
      num_rows: Of all processes together.
      mesh: Where to.
    """
    each = pad_rows(num_rows, mesh) // num_row_shards(mesh)
    dtype, width = share.values.dtype, share.values.shape[1:]

    def part(shard: int) -> np.ndarray:
        start, stop = (min(at * each, num_rows) for at in (shard, shard + 1))
        first = np.searchsorted(share.ids, start)
        rows = share.values[first : first + stop - start]
        missing = each - len(rows)
        return np.concatenate([rows, np.zeros((missing, *width), dtype)]) if missing else rows

    return _from_parts(part, each, width, mesh)


def share_of(rows: jax.Array, num_rows: int, mesh: Mesh, *, kept: bool = False) -> Share:
    """The rows of a spread array that this process holds (or keeps: see `row_shards`), on the host;
    what is padding is left out."""
    each = rows.shape[0] // num_row_shards(mesh)
    parts = {shard.index[0].start or 0: shard.data for shard in rows.addressable_shards}
    found = [np.asarray(parts[shard * each]) for shard in row_shards(mesh, kept=kept)]
    ids = row_ids(num_rows, mesh, kept=kept)
    values = np.concatenate(found) if len(found) != 1 else found[0]
    return Share(ids, values[: len(ids)])


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, rows spread, from the parts that this process's devices hold.

    Args:
      batch: Arrays whose rows belong, in equal parts, to `row_shards(mesh)`.
      mesh: Where to.
    """
    here = row_shards(mesh)

    def place(x: np.ndarray) -> jax.Array:
        each = x.shape[0] // len(here)
        if each * len(here) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows cannot be dealt out to {len(here)} devices")
        return _from_parts(
            lambda shard: x[here.index(shard) * each :][:each], each, x.shape[1:], mesh
        )

    return jax.tree.map(place, batch)


def everywhere(x: Any, mesh: Mesh) -> jax.Array:
    """An array that all processes have alike, whole on every device."""
    return jax.jit(lambda: x, out_shardings=replicated(mesh))()


def on_host(x: jax.Array) -> np.ndarray:
    """An array that lies over the devices of all processes, whole in each of them."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x))


def abstract_on_devices(batch: Any, mesh: Mesh) -> Any:
    """What `to_devices` gives, of whole shapes and dtypes alone."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding(mesh)), batch
    )


def _from_parts(
    part: Callable[[int], np.ndarray], each: int, width: tuple[int, ...], mesh: Mesh
) -> jax.Array:
    """A spread array of which `part(shard)` is one device's `each` rows."""
    shards = num_row_shards(mesh)
    devices = mesh.devices.reshape(shards, -1)
    parts = [
        jax.device_put(part(shard), device)
        for shard in row_shards(mesh)
        for device in devices[shard]
        if device.process_index == jax.process_index()
    ]
    return jax.make_array_from_single_device_arrays(
        (each * shards, *width), rows_sharding(mesh), parts
    )
