"""Attention: which implementation computes it where, and that all compute the same."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from vixml_jax.models import attention
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig, Rope
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.siglip import SiglipConfig, VisionTower
from vixml_jax.models.tower import ShardLayout, Tower
from vixml_jax.parallel import sharding
from vixml_jax.structs import PackedItems

SIZES = {"vocab_size": 40, "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 40}
BERT = BertConfig(**SIZES, max_positions=2048)
MODERN = ModernBertConfig(**SIZES, rope=Rope(), local_rope=Rope())
QWEN = DecoderConfig(**SIZES | {"num_heads": 14}, num_kv_heads=2, head_width=64)
GEMMA = DecoderConfig(**SIZES, num_kv_heads=2, head_width=256, window=512, global_every=6)

CPU, TPU = (SimpleNamespace(platform=name) for name in ("cpu", "tpu"))


def gpu(capability):
    return SimpleNamespace(platform="gpu", compute_capability=capability)


A100, H100, B200 = gpu("8.0"), gpu("9.0"), gpu("10.0")


def needs_of(config, row_width, *, training=True, dtype="bfloat16", **changes):
    config = dataclasses.replace(config, dtype=dtype, **changes)
    return config.attention_needs(row_width, training=training)


CHOICES = [
    (needs_of(BERT, 128), A100, 1, "cudnn"),
    (needs_of(BERT, 128), A100, 4, "cudnn"),
    (needs_of(BERT, 128), A100, 8, "does not divide 4 heads"),
    (needs_of(BERT, 128, dtype="float32"), A100, 1, "float32"),
    (needs_of(BERT, 127), A100, 1, "even width, found 127"),
    (needs_of(BERT, 128), gpu("7.5"), 1, "found 7.5"),
    (needs_of(BERT, 128), gpu("gfx90a"), 1, "unknown"),
    (needs_of(BERT, 128), SimpleNamespace(platform="gpu"), 1, "unknown"),
    (needs_of(BERT, 128, width=20), A100, 1, "heads of width 5"),
    (needs_of(BERT, 128, distance_buckets=32), H100, 1, "cudnn"),
    (needs_of(MODERN, 1024), B200, 1, "cudnn"),
    (needs_of(QWEN, 256), H100, 2, "cudnn"),
    (needs_of(QWEN, 256), H100, 4, "tensor axis of size 4 does not divide"),
    (needs_of(GEMMA, 256), A100, 1, "heads of width 256"),
    (needs_of(GEMMA, 256), B200, 1, "heads of width 256"),
    (needs_of(GEMMA, 256), H100, 1, "without the GPU"),
    (needs_of(BERT, 128), CPU, 1, "no fused attention on cpu"),
    (needs_of(BERT, 128), SimpleNamespace(platform="rocm"), 1, "no fused attention on rocm"),
    (needs_of(BERT, 384), TPU, 1, "shorter than 512"),
    (needs_of(BERT, 512), TPU, 1, "no dropout"),
    (needs_of(BERT, 512, training=False), TPU, 1, "splash"),
    (needs_of(BERT, 512, attention_dropout=0.0), TPU, 1, "splash"),
    (needs_of(BERT, 512, attention_dropout=0.0, distance_buckets=32), TPU, 1, "no biases"),
    (needs_of(BERT, 576, training=False), TPU, 1, "multiple of 128, found 576"),
    (needs_of(MODERN, 512), TPU, 1, "no local layers"),
    (needs_of(QWEN, 1024), TPU, 2, "splash"),
    (needs_of(QWEN, 1024), TPU, 4, "tensor axis of size 4 does not divide"),
    (needs_of(QWEN, 1024, dtype="float32"), TPU, 1, "float32"),
    (needs_of(GEMMA, 512), TPU, 1, "splash"),
    (needs_of(GEMMA, 640), TPU, 1, "no sliding windows"),
    (SiglipConfig(dtype="bfloat16").attention_needs, A100, 1, "cudnn"),
    (SiglipConfig(dtype="bfloat16").attention_needs, TPU, 1, "rows of 196"),
]  # fmt: skip


def test_choice_of_the_implementation():
    for needs, device, tensor, expected in CHOICES:
        choice = attention.choose(needs, device, tensor)
        if expected in ("cudnn", "splash"):
            assert choice == (expected, ""), needs
        else:
            assert choice.implementation == "xla" and expected in choice.reason, (needs, choice)
            assert str(choice) == f"xla ({choice.reason})"


def test_wide_heads_take_cudnn_on_a_hopper_gpu_of_the_run(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [A100, H100, B200])
    found = [attention.choose(needs_of(GEMMA, 256), x).implementation for x in (A100, H100, B200)]
    assert found == ["xla", "cudnn", "xla"]


def draw(rng, *, rows, width, heads, kv_heads, head_width):
    """Queries, keys, values and items of rows, the last of which may be empty positions."""
    shapes = [(rows, width, n, head_width) for n in (heads, kv_heads, kv_heads)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    segments = np.sort(rng.integers(-1, 4, (rows, width)), axis=1)[:, ::-1]
    return *arrays, segments.astype(np.int32)


def by_numpy(q, k, v, mask, scale, bias=0.0):
    """Attention in float64, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("psha,ptha->phst", q, k) * scale + bias
    weights = np.where(mask[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    return np.einsum("phst,ptha->psha", weights / weights.sum(-1, keepdims=True), v)


def mask_of(segments, causal):
    width = segments.shape[1]
    earlier = np.arange(width)[:, None] >= np.arange(width)[None]
    return (segments[:, :, None] == segments[:, None]) & (earlier | (not causal))


@pytest.mark.parametrize(("kv_heads", "biased"), [(4, False), (4, True), (2, False)])
def test_xla_and_the_arguments_of_cudnn_match_numpy(monkeypatch, kv_heads, biased):
    rng = np.random.default_rng()
    q, k, v, segments = draw(rng, rows=4, width=10, heads=4, kv_heads=kv_heads, head_width=8)
    bias = rng.normal(size=(4, 4, 10, 10)).astype(np.float32) if biased else None
    reference = jax.nn.dot_product_attention

    def without_cudnn(*arrays, implementation, **rest):
        assert implementation in ("cudnn", "xla")
        return reference(*arrays, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    mesh = sharding.create_mesh(fsdp=4, tensor=2)
    expected = by_numpy(q, k, v, mask_of(segments, True), 0.3, 0.0 if bias is None else bias)

    def run(implementation, q, k, v, segments, bias):
        mask = attention.within_items(segments, implementation, causal=True)
        with sharding.activation_sharding(mesh):
            return attention.attend(
                q, k, v, mask, scale=0.3, bias=bias, implementation=implementation
            )

    arrays = jax.device_put((q, k, v, segments, bias), sharding.replicated(mesh))
    for implementation in ("xla", "cudnn"):
        found = jax.jit(run, static_argnums=0)(implementation, *arrays)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_position_without_keys_attends_to_all_evenly():
    rng = np.random.default_rng()
    q, k, v, _ = draw(rng, rows=2, width=5, heads=3, kv_heads=3, head_width=4)
    mask = rng.random((2, 5, 5)) < 0.5
    mask[0, 2] = False
    np.testing.assert_allclose(attention.attend(q, k, v, mask)[0, 2], v[0].mean(0), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_splash_attention_matches_numpy(monkeypatch, causal):
    """With causal attention within items, and among all positions, as in a vision tower."""
    interpreted = functools.partial(kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha", interpreted)
    rng = np.random.default_rng()
    q, k, v, segments = draw(rng, rows=1, width=128, heads=2, kv_heads=1, head_width=8)
    segments = segments if causal else np.zeros_like(segments)
    allowed = attention.within_items(segments, "splash", causal=causal) if causal else None
    found = attention.attend(
        q, k, v, allowed, scale=0.3, implementation="splash", causal=causal
    )  # fmt: skip
    expected = by_numpy(q, k, v, mask_of(segments, causal), 0.3)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_hidden_keys():
    mask = np.random.default_rng().random((50, 20, 20)) < 0.7
    mask |= np.eye(20, dtype=bool)
    hidden = np.asarray(attention.hide_keys(jnp.asarray(mask), 0.25, jax.random.key(3)))
    assert not (hidden & ~mask).any()
    assert hidden[:, np.arange(20), np.arange(20)].all()
    others = mask & ~np.eye(20, dtype=bool)
    np.testing.assert_allclose(hidden[others].mean(), 0.75, atol=4 * 0.44 / others.sum() ** 0.5)
    assert attention.hide_keys(mask, 0.0, jax.random.key(3)) is mask
    assert attention.hide_keys(mask, 0.25, None) is mask


def test_a_hidden_key_is_as_if_the_item_had_not_held_it():
    """What remains sums to one, unlike in dropout of the weights after the softmax."""
    rng = np.random.default_rng()
    q, k, v, _ = draw(rng, rows=2, width=6, heads=2, kv_heads=2, head_width=4)
    mask = attention.hide_keys(jnp.ones((2, 6, 6), bool), 0.5, jax.random.key(rng.integers(99)))
    found = attention.attend(q, k, v, mask)
    for row, position in np.ndindex(2, 6):
        seen = np.asarray(mask)[row, position]
        scores = np.einsum("ha,tha->ht", q[row, position], k[row, seen]) / 2
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.einsum("ht,tha->ha", weights, v[row, seen])
        np.testing.assert_allclose(found[row, position], expected, atol=1e-6)


def lowered(config, implementation, platform, mesh, width):
    """Text of the gradient of a tower, lowered for a platform that need not be here."""
    tower, rows = Tower(config, implementation), 8
    packed = PackedItems(
        *[np.zeros((rows, width), np.int32)] * 4, images=np.zeros((0, 1), np.float16)
    )
    like = jax.eval_shape(
        lambda: nn.unbox(tower.clone(attention="xla").init(
            jax.random.key(0), jax.tree.map(lambda x: x[:1], packed), 1, deterministic=True
        ))
    )["params"]  # fmt: skip
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), like
    )

    def loss(params, packed, key):
        layout = ShardLayout(sharding.num_row_shards(mesh))
        rngs = {"dropout": key} if implementation == "cudnn" else None
        with sharding.activation_sharding(mesh):
            vectors = tower.apply(
                {"params": params}, packed, rows, deterministic=not rngs, rngs=rngs, shards=layout
            )
        return jnp.sum(vectors)

    operands = (like, sharding.abstract_on_devices(packed, mesh), jax.random.key(0))
    traced = jax.jit(jax.grad(loss)).trace(*operands)
    return traced.lower(lowering_platforms=(platform,)).as_text()


TOWERS = {
    "bert": BERT,
    "mpnet": dataclasses.replace(BERT, distance_buckets=32, max_positions=64),
    "modernbert": dataclasses.replace(MODERN, attention_dropout=0.1, window=9),
    "qwen": dataclasses.replace(QWEN, lora_rank=2),
    "gemma": dataclasses.replace(GEMMA, head_width=128, window=20, num_heads=2),
}


@pytest.mark.parametrize(("family", "scan"), [("bert", False), *((x, True) for x in TOWERS)])
def test_towers_lower_for_gpus_without_scores_in_memory(monkeypatch, family, scan):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    config = dataclasses.replace(TOWERS[family], dtype="bfloat16", scan=scan, remat=scan)
    text = lowered(config, "cudnn", "cuda", sharding.create_mesh(fsdp=4, tensor=2), 62)
    kernel = "__cudnn$fmhaScaleBiasSoftmax"
    assert set(re.findall(r"__cudnn\$\w+", text)) == {kernel, f"{kernel}Backward"}
    if family != "mpnet":  # Its biases, which all layers share, have the shape of scores.
        assert not re.search(r"tensor<\d+x\d+x62x62xf32>", text)
    assert "8x4x62x31xui32" not in text  # Random numbers of each head.


@pytest.mark.parametrize("family", ["bert", "qwen", "gemma"])
def test_towers_lower_for_tpus_without_scores_in_memory(family):
    changes = {"window": 512} if family == "gemma" else {}
    config = dataclasses.replace(TOWERS[family], dtype="bfloat16", remat=False, **changes)
    config = dataclasses.replace(config, scan=True)
    text = lowered(config, "splash", "tpu", sharding.create_mesh(fsdp=4, tensor=2), 512)
    assert text.count("tpu_custom_call") == 3  # Forward, and gradients of queries and of keys.
    assert not re.search(r"tensor<(\d+x)+512x512x", text)


def test_the_vision_tower_lowers_for_gpus(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    config = SiglipConfig(image_size=28, patch_size=4, num_layers=2, width=32, num_heads=4,
                          mlp_width=40, dtype="bfloat16")  # fmt: skip
    pixels = np.zeros((2, 28, 28, 3), np.float32)
    like = jax.eval_shape(lambda: nn.unbox(VisionTower(config).init(jax.random.key(0), pixels)))
    traced = jax.jit(VisionTower(config, "cudnn").apply).trace(like, pixels)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "49x49" not in text


@pytest.mark.parametrize("family", ["bert", "qwen"])
def test_a_tower_is_exported_for_all_platforms_on_a_machine_with_a_gpu(monkeypatch, family):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    tower = Tower(dataclasses.replace(TOWERS[family], dtype="bfloat16"))

    def encode(ids):
        packed = PackedItems(ids, ids, ids, ids - 1, jnp.zeros((0, 1), jnp.float16))
        params = nn.unbox(tower.init(jax.random.key(0), packed, 1, deterministic=True))
        return tower.apply(params, packed, ids.shape[0], deterministic=True)

    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t"), jnp.int32)
    exported = jax.export.export(jax.jit(encode), platforms=("cpu", "cuda", "tpu"))(shape)
    assert "custom_call @__cudnn" not in exported.mlir_module()
