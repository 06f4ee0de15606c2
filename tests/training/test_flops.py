"""Tests of operation counts, against traced programs, XLA's estimate and counts by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.pairs import as_pairs
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models import published_towers as towers
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig, Rope
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.tower import Tower
from vixml_jax.structs import Batch, PackedItems, Positives
from vixml_jax.training import flops, losses

BERT = BertConfig(
    vocab_size=50, num_layers=3, width=24, num_heads=4, mlp_width=40, max_positions=32,
    image_width=10,
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=50, num_layers=2, width=24, num_heads=6, num_kv_heads=2, head_width=8, mlp_width=40,
    causal=False, scan=False, remat=False, image_width=10,
)  # fmt: skip

MODERN = ModernBertConfig(
    vocab_size=50, num_layers=3, width=24, num_heads=4, mlp_width=40, max_positions=32,
    global_every=1, rope=Rope(), local_rope=Rope(), image_width=10,
)  # fmt: skip


def products(jaxpr, times=1):
    """Operations of all matrix products in a traced program, two for each multiplication."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            size = equation.invars[0].aval.shape
            out = equation.outvars[0].aval.shape
            total += 2 * times * int(np.prod(out)) * int(np.prod([size[i] for i in summed]))
        inner = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(value, "eqns"):
                total += products(value, inner)
            elif hasattr(getattr(value, "jaxpr", None), "eqns"):
                total += products(value.jaxpr, inner)
    return total


def full_rows(num_items, length, num_images):
    """Items that each fill a row, so that dense attention computes no padding."""
    at = np.full((num_items, length), -1, np.int32)
    at[:, :num_images] = np.arange(num_items * num_images).reshape(num_items, -1)
    return PackedItems(
        tokens=np.ones((num_items, length), np.int32),
        segments=np.repeat(np.arange(num_items, dtype=np.int32)[:, None], length, axis=1),
        positions=np.tile(np.arange(length, dtype=np.int32), (num_items, 1)),
        image_at=at,
        images=np.ones((num_items * num_images, 10), np.float16),
    )


def zeros(init, *args):
    """Zero parameters of the right shapes, without compiling the initialisation."""
    shapes = nn.unbox(jax.eval_shape(lambda: init(jax.random.key(0), *args, deterministic=True)))
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def trained_of(params, config):
    """The trained parameters, and a function that merges them with the others."""
    if not getattr(config, "lora_rank", 0):
        return params, lambda trained: trained
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in flat]
    chosen = [i for i, name in enumerate(names) if "lora" in name or "image_projection" in name]

    def merge(trained):
        leaves = [leaf for _, leaf in flat]
        for i, leaf in zip(chosen, trained, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(tree, leaves)

    return [flat[i][1] for i in chosen], merge


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        dataclasses.replace(BERT, scan=True),
        DECODER,
        MODERN,
        dataclasses.replace(DECODER, lora_rank=4),
        dataclasses.replace(DECODER, lora_rank=3, lora_maps=("query", "down")),
    ],
    ids=[
        "bert",
        "scanned bert",
        "decoder",
        "modernbert",
        "adapters on all maps",
        "adapters on some maps",
    ],
)
def test_tower_flops_match_traced_products(config):
    rng = np.random.default_rng()
    items, length, item_images = (int(rng.integers(*ends)) for ends in ((2, 6), (5, 12), (1, 4)))
    packed = full_rows(items, length, item_images)
    tower = Tower(config)
    params = zeros(tower.init, packed, items)["params"]
    trained, merge = trained_of(params, config)

    def forward(trained):
        return jnp.sum(tower.apply({"params": merge(trained)}, packed, items, deterministic=True))

    counted = flops.tower_flops(config, flops.item_lengths(packed), items * item_images)
    assert counted.forward == products(jax.make_jaxpr(forward)(trained).jaxpr)
    # Images come before the first layer, so even a frozen first layer passes a gradient on.
    traced_step = products(jax.make_jaxpr(jax.grad(forward))(trained).jaxpr)
    assert counted.step == traced_step


def test_tower_flops_match_the_estimate_of_xla():
    config = dataclasses.replace(BERT, width=96, mlp_width=384, num_layers=2)
    packed = full_rows(6, 16, 2)
    tower = Tower(config)
    params = zeros(tower.init, packed, 6)
    run = functools.partial(tower.apply, num_items=6, deterministic=True)
    compiled = jax.jit(lambda params: run(params, packed)).lower(params).compile()
    estimated = compiled.cost_analysis()["flops"]
    counted = flops.tower_flops(config, flops.item_lengths(packed), 12).forward
    assert counted < estimated < 1.05 * counted  # XLA also counts norms, softmax and GELU.


def test_combiner_and_similarity_flops_match_traced_products():
    combiner, rows, width = Combiner(num_heads=2, mlp_width=20, dropout=0.0), 7, 12
    x = jnp.ones((rows, width))
    params = zeros(combiner.init, x, x, x)

    def forward(params, u, free):
        return jnp.sum(combiner.apply(params, u, free, x, deterministic=True))

    counted = flops.combiner_flops(combiner, rows, width)
    assert counted.forward == products(jax.make_jaxpr(forward)(params, x, x).jaxpr)
    gradient = jax.grad(forward, argnums=(0, 1, 2))
    assert counted.step == products(jax.make_jaxpr(gradient)(params, x, x).jaxpr)

    def loss(queries, labels, prototypes):
        pairs = as_pairs(jnp.eye(5, rows, dtype=bool))
        real, key = jnp.ones(5, bool), jax.random.key(0)
        return losses.total_loss(
            queries, labels, prototypes, *pairs, real, jnp.ones(rows, bool), key,
            num_negatives=2, margin_min=0.1, margin_max=0.3, temperature=0.1,
        )[0]  # fmt: skip

    queries = jnp.ones((5, width))
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    # The scores of labels against queries are computed again to save communication, but are counted
    # once.
    traced = products(jax.make_jaxpr(gradient)(queries, x, x).jaxpr)
    assert flops.similarity_flops(5, rows, width, 2).step == traced * 2 / 3
    gradient = jax.grad(lambda queries, labels: loss(queries, labels, None), argnums=(0, 1))
    assert flops.similarity_flops(5, rows, width, 1).step == products(
        jax.make_jaxpr(gradient)(queries, x).jaxpr
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_attended_pairs_match_an_attention_mask(causal, window):
    lengths = np.random.default_rng().integers(0, 12, 9)
    expected = 0
    for n in lengths:
        back = np.arange(n)[:, None] - np.arange(n)[None, :]
        seen = (back >= 0) if causal else np.ones((n, n), bool)
        expected += np.sum(seen & (np.abs(back) < window) if window else seen)
    assert flops.attended_pairs(lengths, causal=causal, window=window) == expected


def test_step_flops_match_a_count_by_hand():
    """Queries of 3 and 2 positions, one label of 4 positions and one padding label, one image."""
    segments = np.array([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    image_at = np.full((2, 6), -1)
    image_at[0, 0] = 0
    blank = np.zeros((2, 6), np.int32)
    batch = Batch(
        PackedItems(blank, segments, blank, image_at, np.zeros((4, 10), np.float16)),
        np.array([5, 8]),
        np.array([3, -1]),
        Positives(np.array([-1]), np.array([-1])),
    )
    config = dataclasses.replace(BERT, num_layers=1)
    # 9 positions. A multiplication counts 2 operations forward and 4 backward. Each pair of
    # positions has two products, scores and weighted sums. Images need no gradient.
    dense = 6 * 9 * (4 * 24 * 24 + 2 * 24 * 40)
    attention = 6 * 2 * 24 * (3 * 3 + 2 * 2 + 4 * 4)
    image = 4 * 10 * 24
    assert flops.step_flops(config, None, batch) == dense + attention + image + 6 * 2 * 1 * 24
    combiner = Combiner(num_heads=4, mlp_width=16)
    more = 6 * (3 * (4 * 24 * 24 + 2 * 24 * 16) + 2 * 3 * 3 * 24) + 6 * 2 * 1 * 24
    without = flops.step_flops(config, None, batch)
    assert flops.step_flops(config, combiner, batch) - without == more


def test_sliding_window_layers_need_fewer_flops():
    config = dataclasses.replace(DECODER, num_layers=6, window=4, global_every=3, causal=True)
    lengths = np.array([10])
    full = flops.tower_flops(dataclasses.replace(config, window=0), lengths, 0).forward
    windowed = flops.tower_flops(config, lengths, 0).forward
    # Four of six layers have a window: 10 + 9 + ... + 1 pairs become 1 + 2 + 3 + 7 times 4.
    assert full - windowed == 4 * 4 * 6 * 8 * (55 - 34)


def test_tower_flops_of_a_published_decoder_match_a_count_by_hand():
    """Qwen2.5-3B: 36 layers of 2048, 16 query and 2 key heads of 128, feed-forward 11008."""
    config = towers.config_of("Qwen/Qwen2.5-3B-Instruct")
    dense = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    pairs = 36 * 4 * 2048 * (40 * 41 / 2)
    lengths = np.full(5, 40)
    plain = flops.tower_flops(config, lengths, 0)
    assert plain == (200 * 2 * dense + 5 * pairs, 200 * 6 * dense + 15 * pairs)
    adapted = flops.tower_flops(dataclasses.replace(config, lora_rank=8), lengths, 0)
    low = 36 * 8 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008))
    assert adapted.forward - plain.forward == 200 * 2 * low
    assert adapted.step == 200 * (4 * dense + 6 * low) + 15 * pairs
