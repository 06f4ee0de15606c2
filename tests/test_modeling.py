"""The model: activations are constrained to its mesh, products have the precision of the run."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from vixml_jax import workdir
from vixml_jax.config import Config, LabelsConfig, ModelConfig
from vixml_jax.data.packing import Layout
from vixml_jax.models import layers
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import sharding
from vixml_jax.serving import exporting
from vixml_jax.structs import PackedItems

TOWER = BertConfig(
    vocab_size=50, num_layers=2, width=32, num_heads=4, mlp_width=64, max_positions=16
)


@pytest.fixture
def packed():
    rng = np.random.default_rng(0)
    segments = np.repeat(np.arange(16), 8).reshape(8, 16)
    return PackedItems(
        tokens=rng.integers(50, size=(8, 16), dtype=np.int32),
        segments=segments.astype(np.int32),
        positions=np.tile(np.arange(8, dtype=np.int32), (8, 2)),
        image_at=np.full((8, 16), -1, np.int32),
        images=np.zeros((0, 1), np.float16),
    )


def vectors(mesh, packed):
    model = workdir.build_model(Config(), TOWER, Layout(), 5, mesh)
    stored = sharding.stored_tree(model.abstract_params, mesh)
    params = nn.unbox(model.init_params(jax.random.key(0)))
    params = jax.device_put(
        sharding.pad(params, stored), jax.tree.map(lambda x: x.sharding, stored)
    )
    encode = jax.jit(lambda params, packed: model.tower_vectors(params, packed, 16))
    lowered = encode.lower(params, sharding.to_devices(packed, mesh))
    return np.asarray(lowered.compile()(params, sharding.to_devices(packed, mesh))), lowered


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_blocks_may_have_arrays_of_their_own(packed, shape):
    tower = dataclasses.replace(TOWER, num_layers=3)
    mesh = sharding.create_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    model = workdir.build_model(Config(), tower, Layout(), 5, mesh)
    stored = sharding.stored_tree(model.abstract_params, mesh)
    params = nn.unbox(model.init_params(jax.random.key(0)))
    params = jax.device_put(
        sharding.pad(params, stored), jax.tree.map(lambda x: x.sharding, stored)
    )
    own = {**params, "tower": layers.unstacked(params["tower"])}
    assert layers.is_unstacked(own["tower"]) and not layers.is_unstacked(params["tower"])
    stacks = params["tower"]["encoder"]["blocks"]
    for i in range(tower.num_layers):
        block = own["tower"]["encoder"]["blocks"][str(i)]
        for stack, layer in zip(jax.tree.leaves(stacks), jax.tree.leaves(block), strict=True):
            np.testing.assert_array_equal(layer, stack[i])
            assert (
                layer.sharding.shard_shape(layer.shape)
                == stack.sharding.shard_shape(stack.shape)[1:]
            )
    jax.tree.map(np.testing.assert_array_equal, layers.stacked(own["tower"]), params["tower"])
    jax.tree.map(np.testing.assert_array_equal, layers.stacked(params["tower"]), params["tower"])
    encode = jax.jit(lambda params, packed: model.tower_vectors(params, packed, 16))
    on_devices = sharding.to_devices(packed, mesh)
    expected, found = encode(params, on_devices), encode(own, on_devices)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Nothing of a layer is copied out of a stack.
    text = encode.lower(own, on_devices).as_text()
    assert f"tensor<{tower.num_layers}x" not in text
    assert f"tensor<{tower.num_layers}x" in encode.lower(params, on_devices).as_text()


def test_activations_are_sharded_over_the_mesh(packed):
    found, lowered = vectors(sharding.create_mesh(2, 2, 2), packed)
    constraints = [line for line in lowered.as_text().splitlines() if "constraint" in line]
    states = [line for line in constraints if "tensor<8x16x32xf32>" in line]
    # Rows are sharded over (replica, fsdp) after the lookup, before the blocks, and after each
    # block. During the lookup of token embeddings the width is sharded over fsdp.
    looked_up = [line for line in states if '[{"replica"}, {}, {"fsdp"}]' in line]
    rest = [line for line in states if line not in looked_up]
    assert len(looked_up) == 1
    assert len(rest) == 2 + TOWER.num_layers
    assert all('[{"replica", "fsdp"}, {}, {}]' in line for line in rest)
    plain = workdir.build_model(Config(), TOWER, Layout(), 5, sharding.create_mesh(1, 8, 1))
    params = nn.unbox(plain.init_params(jax.random.key(0)))
    expected = plain.tower.apply({"params": params["tower"]}, packed, 16, deterministic=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_all_products_of_tower_and_prototypes_have_the_precision_of_the_run(packed, precision):
    """Also those of the gradient, of rematerialised layers, and of an exported program."""
    config = Config(
        model=ModelConfig(matmul_precision=precision),
        labels=LabelsConfig(num_free=4, num_heads=4, mlp_width=8),
    )
    tower = dataclasses.replace(TOWER, scan=True, remat=True)
    mesh = sharding.create_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = workdir.build_model(config, tower, Layout(), 5, mesh)
    abstract = nn.unbox(model.abstract_params)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
    centroids = np.zeros((16, 32), np.float32)

    def total(params):
        vectors = model.tower_vectors(params, packed, 16, dropout=jax.random.key(1))
        prototypes = model.prototypes(
            params, None, vectors, None, free=centroids, centroids=centroids
        )
        return prototypes.sum()

    traced = str(jax.make_jaxpr(jax.grad(total))(params))
    name = f"Precision.{precision.upper()}"
    products = traced.count("dot_general[")
    assert products > 3 * 6  # Forward, again for the backward pass, and backward.
    expected = 0 if precision == "default" else products
    assert traced.count(f"precision=({name}, {name})") == expected

    program = exporting.program(model, params["tower"]).mlir_module()
    products = program.count("stablehlo.dot_general")
    expected = 0 if precision == "default" else products
    assert products and program.count(f"precision = [{precision.upper()}, ") == expected
