"""Mesh and rules: the only place that knows both the logical axes and the mesh."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs "
            f"{int(np.prod(sizes))} devices, found {len(devices)}"
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
    shards = num_row_shards(mesh)
    return -(-num_rows // shards) * shards


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of `abstract`, by its logical axes; replicated where it has none.

    Args:
      abstract: What `jax.eval_shape` of a Linen `init` gives, boxed leaves included.
      mesh: Where to place it. An axis that does not divide a dimension is left whole.
    """
    specs = nn.get_partition_spec(abstract)
    return jax.tree.map(
        lambda leaf, spec: sharding_of(leaf.shape, tuple(spec), mesh), nn.unbox(abstract), specs
    )


def sharding_of(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array, by the logical axis of each dimension; missing ones are None.

    An axis of the mesh that does not divide a dimension leaves it whole.
    """
    mapped = nn.logical_to_mesh_axes(names, AXIS_RULES)
    fitted = [
        axis if axis is None or size % _axis_size(mesh, axis) == 0 else None
        for size, axis in itertools.zip_longest(shape, tuple(mapped)[: len(shape)])
    ]
    return NamedSharding(mesh, P(*fitted))


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
    rows, whole = rows_sharding(mesh), replicated(mesh)
    shards = num_row_shards(mesh)

    def place(x: np.ndarray) -> jax.Array:
        spread = x.ndim > 0 and x.shape[0] and x.shape[0] % shards == 0
        return jax.device_put(x, rows if spread else whole)

    return jax.tree.map(place, batch)
