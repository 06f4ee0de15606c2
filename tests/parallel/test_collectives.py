"""Communication volume of compiled programs against volumes counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vixml_jax.parallel import collectives, sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh(2, 4, 1)


def compiled(mesh, function, *shapes, specs, out):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_volume_of_each_kind(mesh):
    def exchange(x):  # [2, 6] of [16, 6]
        gathered = jax.lax.all_gather(x, ("replica", "fsdp"), tiled=True)  # [16, 6] over 8
        summed = jax.lax.psum(x, "fsdp")  # [2, 6] over 4
        part = jax.lax.psum_scatter(gathered, "fsdp", tiled=True)  # [4, 6] of [16, 6] over 4
        balanced = jax.lax.all_to_all(gathered, "replica", 0, 0, tiled=True)  # [16, 6] over 2
        permuted = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])  # [2, 6]
        return sum(jnp.sum(y) for y in (gathered, summed * summed, part * part, balanced, permuted))

    found = collectives.collectives(
        compiled(mesh, exchange, (16, 6), specs=P(sharding.ROWS), out=P())
    )
    sent = {}
    for c in found:
        if c.size > 8:  # Not the scalar sums.
            sent[c.kind] = sent.get(c.kind, 0) + c.sent
            assert c.times == 1
    full_size = 4 * 16 * 6
    assert sent == {
        "all-gather": full_size * 7 / 8,
        "all-reduce": 2 * 4 * 12 * 3 / 4,
        "reduce-scatter": full_size * 3 / 4,
        "all-to-all": full_size / 2,
        "collective-permute": 4 * 12,
    }


def test_collectives_in_loops_count_once_per_iteration(mesh):
    def looped(x):
        def outer(total, _):
            def inner(total, _):
                return jax.lax.psum(jnp.sin(total), "fsdp"), None

            return jax.lax.scan(inner, total, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    found = collectives.collectives(
        compiled(mesh, looped, (8, 32), specs=P(sharding.ROWS), out=P(sharding.ROWS))
    )
    assert sum(c.times for c in found) == 15
    assert sum(c.sent for c in found) == 15 * 2 * (4 * 32) * 3 / 4


def test_loops_of_unknown_length_are_refused(mesh):
    def looped(x):
        return jax.lax.while_loop(
            lambda x: jax.lax.psum(jnp.sum(x), sharding.ROWS) < 100.0,
            functools.partial(jnp.multiply, 2.0),
            x,
        )

    program = compiled(mesh, looped, (8, 32), specs=P(sharding.ROWS), out=P(sharding.ROWS))
    with pytest.raises(ValueError, match="unknown number of iterations"):
        collectives.collectives(program)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_notations_of_groups(groups, devices):
    text = (
        "HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {\n"
        f"  ROOT %r = bf16[4,3]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}\n"
        "}\n"
    )
    (found,) = collectives.read_collectives(text)
    assert found.devices == devices
    assert found.size == 24 and found.shapes == ((4, 3),)
    with pytest.raises(ValueError, match="unknown notation"):
        collectives.read_collectives(text.replace(groups, "replica_groups=?"))
