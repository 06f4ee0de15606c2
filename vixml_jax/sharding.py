"""Mesh and rules: the only place that knows both the logical axes and the mesh."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax import axes

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
    return nn.LogicallyPartitioned(value, axes.logical(letters))


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


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh: rows spread where they divide, else whole."""
    return jax.tree.map(lambda x: jax.device_put(x, _of_batch(x, mesh)), batch)


def abstract_on_devices(batch: Any, mesh: Mesh) -> Any:
    """What `to_devices` gives, of shapes and dtypes alone."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_of_batch(x, mesh)), batch
    )


def _of_batch(x: Any, mesh: Mesh) -> NamedSharding:
    spread = x.ndim > 0 and x.shape[0] and x.shape[0] % num_row_shards(mesh) == 0
    return rows_sharding(mesh) if spread else replicated(mesh)
