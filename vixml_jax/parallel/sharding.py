"""Meshes and sharding rules: the only module that knows both logical axes and mesh axes."""

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
from vixml_jax.structs import Shard

MESH_AXES = ("replica", "fsdp", "tensor")  # Slowest link first.
ROWS = ("replica", "fsdp")  # Mesh axes that the rows of batches, banks and tables are sharded over.

AXIS_RULES = (
    ("batch", ROWS),
    ("looked_up", "replica"),
    ("label", ROWS),
    ("embed", "fsdp"),
    ("rank", "fsdp"),  # For adapter factors without an embed dimension.
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)


class Stored(NamedTuple):
    """Padded shape and sharding of a stored array."""

    shape: tuple[int, ...]
    sharding: NamedSharding


def create_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices`, by default all; a size of -1 takes the devices left by the others.

    Raises:
      ValueError: If the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        given = ",".join(f"{name}:{n}" for name, n in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"{given} is for {int(np.prod(sizes))} devices, found {len(devices)} "
            f"({devices[0].device_kind}): choose sizes whose product is {len(devices)}, or -1 for "
            "one of them"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def num_row_shards(mesh: Mesh) -> int:
    """Number of shards that rows are divided into."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def num_shards(mesh: Mesh, recorded: int = 8) -> int:
    """Number of shards in which a run packs its batches.

    Dropout depends on positions in packed rows, so a run is the same on any number of devices only
    if it keeps its number of shards.

    Args:
      mesh: The result is a multiple of its number of row shards.
      recorded: Number of shards that the run was started with, which is returned if possible and
        otherwise divides the result.
    """
    return math.lcm(recorded, num_row_shards(mesh))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of rows over (replica, fsdp), with all other dimensions unsharded."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array replicated on every device."""
    return NamedSharding(mesh, P())


def pad_rows(num_rows: int, mesh: Mesh) -> int:
    """Number of rows after padding to a multiple of the row shards."""
    return _multiple(num_rows, num_row_shards(mesh))


def boxed(value: Any, letters: str) -> nn.LogicallyPartitioned:
    """An array (or shape) boxed with the logical axes of its letters; see `axis_names.LETTERS`."""
    return nn.LogicallyPartitioned(value, axis_names.logical(letters))


def sharding_of(names: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """Sharding of an array by the logical axis of each dimension."""
    return NamedSharding(mesh, P(*nn.logical_to_mesh_axes(tuple(names), AXIS_RULES)))


def stored(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh) -> Stored:
    """Sharding and padded shape of a stored array; each dimension is a multiple of its axis size.

    Args:
      shape: Logical shape, as a module declares it.
      names: Logical axis of each dimension.
      mesh: Mesh to shard over.
    """
    sharding = sharding_of(names, mesh)
    shards = [1 if axis is None else _axis_size(mesh, axis) for axis in sharding.spec]
    return Stored(tuple(map(_multiple, shape, shards)), sharding)


def stored_tree(boxed: Any, mesh: Mesh) -> Any:
    """Abstract stored arrays of a tree: padded shapes, dtypes and shardings.

    Args:
      boxed: A tree such as `jax.eval_shape` of a Linen `init` returns. Arrays without logical axes
        are replicated.
      mesh: Mesh to shard over.
    """

    def stored_leaf(x: Any) -> jax.ShapeDtypeStruct:
        shape, sharding = stored(nn.unbox(x).shape, _names_of(x), mesh)
        return jax.ShapeDtypeStruct(shape, nn.unbox(x).dtype, sharding=sharding)

    return jax.tree.map(stored_leaf, boxed, is_leaf=_is_boxed)


def unboxed(tree: Any) -> Any:
    """The arrays of a tree without their logical axes."""
    return nn.unbox(tree)


def pad(tree: Any, like: Any) -> Any:
    """Arrays of logical shapes, zero-padded at the end to the shapes of `like`."""

    def pad_leaf(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        widths = [(0, b - a) for a, b in zip(x.shape, like.shape, strict=True)]
        return jnp.pad(x, widths) if x.shape != like.shape else x

    return jax.tree.map(pad_leaf, tree, like)


def unpad(tree: Any, boxed: Any) -> Any:
    """Stored arrays cut to their logical shapes; arrays without padding are returned as they are.

    The padding stays zero under any optimizer that does not change a zero with zero gradient, such
    as AdamW with weight decay.
    """

    def unpad_leaf(x: jax.Array, logical: Any) -> jax.Array:
        padded = x.shape != logical.shape
        return jax.lax.slice(x, [0] * x.ndim, logical.shape) if padded else x

    return jax.tree.map(unpad_leaf, tree, nn.unbox(boxed))


def describe_padding(boxed: Any, mesh: Mesh) -> list[str]:
    """One line for each padded dimension: its name, both sizes, the mesh axes, and the arrays."""
    arrays: dict[tuple[Any, ...], list[str]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_boxed):
        logical_shape, names = nn.unbox(x).shape, _names_of(x)
        shape, sharding = stored(logical_shape, names, mesh)
        for name, axis, size, padded in zip(
            names, sharding.spec, logical_shape, shape, strict=True
        ):
            if size != padded:
                arrays.setdefault((name, axis, size, padded), []).append(path_name(path))
    lines = []
    for (name, axis, size, padded), paths in arrays.items():
        axes = (axis,) if isinstance(axis, str) else axis
        divisor = " x ".join(f"{axis}:{mesh.shape[axis]}" for axis in axes)
        where = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        lines.append(f"padded: {name} from {size} to {padded}, a multiple of {divisor}, in {where}")
    return lines


def path_name(path: tuple[Any, ...]) -> str:
    """Path of a leaf with slashes between the names; indices of tuples are left out."""
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
def activation_sharding(mesh: Mesh) -> Iterator[None]:
    """Context in which modules constrain activations to the mesh by `AXIS_RULES`.

    Outside of it Linen silently ignores the modules' sharding constraints.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(AXIS_RULES):
        yield


def row_shards(mesh: Mesh, process: int | None = None, *, owned: bool = False) -> list[int]:
    """The row shards on a process's devices, ascending.

    Args:
      mesh: Mesh over the devices of all processes.
      process: Index of the process; None for this one.
      owned: Several processes may hold the same shard, if the tensor axis spans them. True returns
        only shards that this process owns; each shard has exactly one owner.
    """
    process = jax.process_index() if process is None else process
    owners = _owners(mesh)
    selected = owners[:, 0] == process if owned else (owners == process).any(axis=1)
    return np.flatnonzero(selected).tolist()


@functools.cache  # Called for every array of every batch.
def _owners(mesh: Mesh) -> Int[np.ndarray, "shards tensor"]:
    """Process index of each device, by row shard."""
    owners = [device.process_index for device in mesh.devices.flat]
    return np.array(owners).reshape(num_row_shards(mesh), -1)


def row_ids(
    num_rows: int, mesh: Mesh, process: int | None = None, *, owned: bool = False
) -> Int[np.ndarray, " m"]:
    """Row ids, ascending and without padding, in the shards that `row_shards` returns."""
    per_shard = pad_rows(num_rows, mesh) // num_row_shards(mesh)
    shards = np.array(row_shards(mesh, process, owned=owned), np.int64)
    ids = (shards[:, None] * per_shard + np.arange(per_shard)).reshape(-1)
    return ids[ids < num_rows]


def spread_rows(local: Shard, num_rows: int, mesh: Mesh) -> jax.Array:
    """An array sharded over (replica, fsdp) and padded with zero rows, from each process's rows.

    Args:
      local: Rows on this process, at least those of `row_ids(num_rows, mesh)`.
      num_rows: Number of rows over all processes.
      mesh: Mesh to shard over.
    """
    per_shard = pad_rows(num_rows, mesh) // num_row_shards(mesh)
    dtype, width = local.values.dtype, local.values.shape[1:]

    def rows_of(shard: int) -> np.ndarray:
        start, stop = (min(i * per_shard, num_rows) for i in (shard, shard + 1))
        first = np.searchsorted(local.ids, start)
        rows = local.values[first : first + stop - start]
        missing = per_shard - len(rows)
        return np.concatenate([rows, np.zeros((missing, *width), dtype)]) if missing else rows

    return _from_shards(rows_of, per_shard, width, mesh)


def shard_of(rows: jax.Array, num_rows: int, mesh: Mesh, *, owned: bool = False) -> Shard:
    """This process's rows of a sharded array, on the host and without padding.

    Args:
      rows: Array with rows sharded over (replica, fsdp).
      num_rows: Number of rows without padding.
      mesh: The array's mesh.
      owned: Whether to return only the shards that this process owns; see `row_shards`.
    """
    per_shard = rows.shape[0] // num_row_shards(mesh)
    data = {shard.index[0].start or 0: shard.data for shard in rows.addressable_shards}
    parts = [np.asarray(data[shard * per_shard]) for shard in row_shards(mesh, owned=owned)]
    ids = row_ids(num_rows, mesh, owned=owned)
    values = np.concatenate(parts) if len(parts) != 1 else parts[0]
    return Shard(ids, values[: len(ids)])


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, sharded by rows, from the rows that belong to this process's devices.

    Args:
      batch: Arrays whose rows belong, in equal parts, to `row_shards(mesh)`.
      mesh: Mesh to shard over.

    Raises:
      ValueError: If the rows cannot be divided equally.
    """
    shards = row_shards(mesh)

    def place(x: np.ndarray) -> jax.Array:
        per_shard = x.shape[0] // len(shards)
        if per_shard * len(shards) != x.shape[0]:
            raise ValueError(
                f"{x.shape[0]} rows cannot be divided equally among {len(shards)} row shards"
            )
        return _from_shards(
            lambda shard: x[shards.index(shard) * per_shard :][:per_shard],
            per_shard,
            x.shape[1:],
            mesh,
        )

    return jax.tree.map(place, batch)


def replicate(x: Any, mesh: Mesh) -> jax.Array:
    """An array, equal on all processes, replicated on every device of the mesh."""
    return jax.jit(lambda: x, out_shardings=replicated(mesh))()


def on_host(x: jax.Array) -> np.ndarray:
    """The full array on the host of every process; all processes must call it together."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x))


def abstract_on_devices(batch: Any, mesh: Mesh) -> Any:
    """Abstract result of `to_devices` for a batch of full shapes and dtypes."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding(mesh)), batch
    )


def _from_shards(
    rows_of: Callable[[int], np.ndarray], per_shard: int, width: tuple[int, ...], mesh: Mesh
) -> jax.Array:
    """A sharded array; `rows_of(shard)` returns the `per_shard` rows of a row shard."""
    shards = num_row_shards(mesh)
    devices = mesh.devices.reshape(shards, -1)
    arrays = [
        jax.device_put(rows_of(shard), device)
        for shard in row_shards(mesh)
        for device in devices[shard]
        if device.process_index == jax.process_index()
    ]
    return jax.make_array_from_single_device_arrays(
        (per_shard * shards, *width), rows_sharding(mesh), arrays
    )
