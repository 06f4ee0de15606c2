"""Operations, memory traffic and least time of programs, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vixml_jax.errors import InputError
from vixml_jax.parallel import accelerators, memory_traffic, products, roofline, sharding


def operations(fn, *shapes, devices=1, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return products.of_program(jax.jit(fn).trace(*arguments), devices)


def test_products_are_counted_in_loops_branches_and_recomputation():
    b, m, n, layers = np.random.default_rng(0).integers(3, 30, 4).tolist()

    def stack(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]

    one = 2.0 * b * m * m
    forward = operations(stack, (b, m), (layers, m, m))
    assert forward["float32"] == layers * one
    # Forward, the product again, and the gradients of input and weight.
    gradient = jax.grad(lambda x, w: stack(x, w).sum(), argnums=(0, 1))
    assert operations(gradient, (b, m), (layers, m, m))["float32"] == 4 * layers * one

    def either(x, w, v):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ v) @ w)

    largest = 2.0 * b * m * m + 2.0 * b * m * n
    assert operations(either, (b, m), (m, n), (m, m))["float32"] == largest
    batched = operations(
        lambda x, y: jnp.einsum("bsha,btha->bhst", x, y), (b, m, 2, n), (b, 7, 2, n)
    )
    assert batched["float32"] == 2.0 * b * m * 2 * n * 7


def test_products_by_dtype_and_precision():
    x = (4, 8), (8, 2)
    found = operations(jnp.matmul, *x, dtype=jnp.bfloat16)
    assert found == dict.fromkeys(products.KINDS, 0.0) | {"bfloat16": 128.0}
    for name, precision in (("", None), (", high", "high"), (", highest", "highest")):
        found = operations(lambda a, b, p=precision: jnp.matmul(a, b, precision=p), *x)
        assert found["float32" + name] == sum(found.values()) == 128.0
    one_pass = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    assert operations(lambda a, b: jnp.matmul(a, b, precision=one_pass), *x)["bfloat16"] == 128.0


def test_products_of_a_shard_are_those_of_one_device():
    mesh = sharding.create_mesh(1, 4, 2)

    def local(x, w):
        return x @ w

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    # All devices along "tensor" compute the same.
    assert operations(sharded, (16, 8), (8, 2), devices=8)["float32"] == 2.0 * 16 * 8 * 2 / 4
    assert operations(local, (16, 8), (8, 2), devices=8)["float32"] == 2.0 * 16 * 8 * 2 / 8


def test_products_in_a_loop_of_unknown_length_are_refused():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown length"):
        operations(loop, (4, 4))


TEXT = """
%sliced (p0: f32[10,100], p1: s32[]) -> f32[100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%cut)
}

%updated (p0.1: bf16[10,64], p1.1: bf16[1,64], p2: s32[]) -> bf16[10,64] {
  %p0.1 = bf16[10,64]{1,0} parameter(0)
  %p1.1 = bf16[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = bf16[10,64]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2, %zero.1)
}

%body (state: (s32[], f32[10,100], bf16[10,64], bf16[1,64])) -> (s32[], f32[10,100], bf16[10,64], bf16[1,64]) {
  %state = (s32[], f32[10,100]{1,0}, bf16[10,64]{1,0}, bf16[1,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[10,100]{1,0} get-tuple-element(%state), index=1
  %out = bf16[10,64]{1,0} get-tuple-element(%state), index=2
  %new = bf16[1,64]{1,0} get-tuple-element(%state), index=3
  %row = f32[100]{0} fusion(%table, %i), kind=kLoop, calls=%sliced
  %on_chip = f32[100]{0:T(128)S(1)} negate(%row)
  %next = bf16[10,64]{1,0} fusion(%out, %new, %i), kind=kLoop, calls=%updated
  ROOT %tuple = (s32[], f32[10,100]{1,0}, bf16[10,64]{1,0}, bf16[1,64]{1,0}) tuple(%i, %table, %next, %new)
}

%condition (state.1: (s32[], f32[10,100], bf16[10,64], bf16[1,64])) -> pred[] {
  %state.1 = (s32[], f32[10,100]{1,0}, bf16[10,64]{1,0}, bf16[1,64]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[16,8], b: f32[8,4], init: (s32[], f32[10,100], bf16[10,64], bf16[1,64])) -> f32[32,4] {
  %a = f32[16,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %init = (s32[], f32[10,100]{1,0}, bf16[10,64]{1,0}, bf16[1,64]{1,0}) parameter(2)
  %loop = (s32[], f32[10,100]{1,0}, bf16[10,64]{1,0}, bf16[1,64]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %gemm = (f32[16,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %c = f32[16,4]{1,0} get-tuple-element(%gemm), index=0
  %gather = (f32[16,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%c), dimensions={0}
  ROOT %done = f32[32,4]{1,0} all-gather-done(%gather)
}
"""  # noqa: E501


def test_traffic_of_slices_updates_loops_and_custom_calls():
    row = 400 + 4 + 400  # The row, the index, the result.
    on_chip = 400  # Read from memory, written to the chip.
    update = 128 + 4 + 128  # The new row, the index, the row in the array.
    predicate = 0  # A constant.
    product = 4 * (16 * 8 + 8 * 4 + 16 * 4)  # Without the workspace.
    gather = 4 * (16 * 4 + 32 * 4)
    expected = 10 * (row + on_chip + update + predicate) + product + gather
    assert memory_traffic.read_traffic(TEXT) == expected


def test_traffic_of_compiled_programs_is_that_of_arguments_and_results():
    n = int(np.random.default_rng(1).integers(100, 1000))
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    one_pass = jax.jit(lambda x: jnp.sin(x) * 2 + 1).lower(x).compile()
    assert memory_traffic.read_traffic(one_pass.as_text()) == 2 * 4 * n * n
    product = jax.jit(lambda x, y: x @ y).lower(x, x).compile()
    assert memory_traffic.read_traffic(product.as_text()) == 3 * 4 * n * n


def test_traffic_in_a_loop_of_unknown_length_is_refused():
    unknown = TEXT.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")
    with pytest.raises(ValueError, match="unknown number of iterations"):
        memory_traffic.read_traffic(unknown)


def test_the_largest_time_binds():
    chip = accelerators.Accelerator(10**9, 10.0, 100.0, (50.0, 20.0, 5.0), 4, 2.0, "")
    counts = dict(zip(products.KINDS, (200.0, 100.0, 40.0, 10.0), strict=True))
    work = roofline.Work(counts, 70.0, {"all-gather": 16.0, "all-reduce": 8.0})
    assert work.flops == 350.0
    assert work.times(chip) == (2.0 + 2.0 + 2.0 + 2.0, 7.0, 3.0)
    assert work.times(chip).bound == "compute"
    assert work._replace(moved=90.0).times(chip).bound == "memory"
    assert work._replace(sent={"all-to-all": 80.0}).times(chip).bound == "links"
    assert "at least (ms)" not in work.describe("cpu")
    assert work.describe("NVIDIA H100 80GB HBM3").endswith("; bound: links")


def test_work_of_a_sharded_program():
    mesh = sharding.create_mesh(1, 8, 1)
    rows = sharding.rows_sharding(mesh)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    jitted = jax.jit(lambda x: jnp.sum(x @ x.T, axis=0), out_shardings=sharding.replicated(mesh))
    traced = jitted.trace(x)
    found = roofline.work(traced, traced.lower().compile(), mesh.size)
    assert found.products["float32"] == 2.0 * 64 * 64 * 32 / 8
    assert set(found.sent) <= {"all-gather", "all-reduce"} and sum(found.sent.values()) > 0
    assert found.moved >= 4 * 64 * 32 / 8


def test_a_program_that_cannot_be_read_is_told_in_one_line():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    traced = jax.jit(lambda x: x).trace(1.0)
    with pytest.raises(InputError, match=r"cannot be read by JAX .* \(INTERNAL: RET_CHECK failure"):
        roofline.work(traced, Unreadable(), 1)
