"""The analytic count against products counted in traced programs, XLA's estimate, and by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vixml_jax.benchmarks.support import towers
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.tower import Tower
from vixml_jax.structs import Batch, PackedItems
from vixml_jax.training import flops, losses

BERT = BertConfig(
    vocab_size=50, num_layers=3, width=24, num_heads=4, mlp_width=40, max_positions=32,
    image_width=10,
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=50, num_layers=2, width=24, num_heads=6, num_kv_heads=2, head_width=8, mlp_width=40,
    causal=False, scan=False, remat=False, image_width=10,
)  # fmt: skip


def products(jaxpr, times=1):
    """Two operations a multiplication of every product of matrices in a traced program."""
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


def full_rows(num_items, length, num_pictures):
    """Each item fills a row of its own, so that a dense attention wastes nothing."""
    at = np.full((num_items, length), -1, np.int32)
    at[:, :num_pictures] = np.arange(num_items * num_pictures).reshape(num_items, -1)
    return PackedItems(
        tokens=np.ones((num_items, length), np.int32),
        segments=np.repeat(np.arange(num_items, dtype=np.int32)[:, None], length, axis=1),
        positions=np.tile(np.arange(length, dtype=np.int32), (num_items, 1)),
        image_at=at,
        images=np.ones((num_items * num_pictures, 10), np.float16),
    )


def zeros(init, *args):
    """Parameters of the right shapes; nothing is compiled."""
    shapes = nn.unbox(jax.eval_shape(lambda: init(jax.random.key(0), *args, deterministic=True)))
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def trained_of(params, config):
    """The parameters of which there is a gradient, and a function that puts all together."""
    if not getattr(config, "lora_rank", 0):
        return params, lambda trained: trained
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in flat]
    chosen = [i for i, name in enumerate(names) if "lora" in name or "image_projection" in name]

    def whole(trained):
        leaves = [leaf for _, leaf in flat]
        for i, leaf in zip(chosen, trained, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(tree, leaves)

    return [flat[i][1] for i in chosen], whole


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        dataclasses.replace(BERT, scan=True),
        DECODER,
        dataclasses.replace(DECODER, lora_rank=4),
        dataclasses.replace(DECODER, lora_rank=3, lora_maps=("query", "down")),
    ],
    ids=["bert", "bert scanned", "decoder", "adapters", "adapters on some"],
)
def test_a_tower_is_counted_as_it_is_traced(config):
    rng = np.random.default_rng()
    items, length, pictures = (int(rng.integers(*ends)) for ends in ((2, 6), (5, 12), (1, 4)))
    packed = full_rows(items, length, pictures)
    tower = Tower(config)
    params = zeros(tower.init, packed, items)["params"]
    trained, whole = trained_of(params, config)

    def forward(trained):
        return jnp.sum(tower.apply({"params": whole(trained)}, packed, items, deterministic=True))

    found = flops.tower_flops(config, flops.item_lengths(packed), items * pictures)
    assert found.forward == products(jax.make_jaxpr(forward)(trained).jaxpr)
    # A picture stands before the first layer, so that even frozen it hands a gradient on.
    counted = products(jax.make_jaxpr(jax.grad(forward))(trained).jaxpr)
    assert found.step == counted


def test_xla_estimates_the_same():
    config = dataclasses.replace(BERT, width=96, mlp_width=384, num_layers=2)
    packed = full_rows(6, 16, 2)
    tower = Tower(config)
    params = zeros(tower.init, packed, 6)
    run = functools.partial(tower.apply, num_items=6, deterministic=True)
    compiled = jax.jit(lambda params: run(params, packed)).lower(params).compile()
    estimated = compiled.cost_analysis()["flops"]
    found = flops.tower_flops(config, flops.item_lengths(packed), 12).forward
    assert found < estimated < 1.05 * found  # XLA counts norms, softmax and GELU, too.


def test_the_combiner_and_the_scores_are_counted_as_they_are_traced():
    combiner, rows, width = Combiner(num_heads=2, mlp_width=20, dropout=0.0), 7, 12
    x = jnp.ones((rows, width))
    params = zeros(combiner.init, x, x, x)

    def forward(params, u, free):
        return jnp.sum(combiner.apply(params, u, free, x, deterministic=True))

    found = flops.combiner_flops(combiner, rows, width)
    assert found.forward == products(jax.make_jaxpr(forward)(params, x, x).jaxpr)
    gradient = jax.grad(forward, argnums=(0, 1, 2))
    assert found.step == products(jax.make_jaxpr(gradient)(params, x, x).jaxpr)

    def loss(queries, labels, prototypes):
        relevance = jnp.eye(5, rows, dtype=bool)
        real, key = jnp.ones(5, bool), jax.random.key(0)
        return losses.total_loss(
            queries, labels, prototypes, relevance, real, jnp.ones(rows, bool), key,
            num_negatives=2, margin_min=0.1, margin_max=0.3, temperature=0.1,
        )[0]  # fmt: skip

    queries = jnp.ones((5, width))
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    # Labels against queries is queries against labels once more, to save sending scores: it counts
    # once.
    traced = products(jax.make_jaxpr(gradient)(queries, x, x).jaxpr)
    assert flops.similarity_flops(5, rows, width, 2).step == traced * 2 / 3
    gradient = jax.grad(lambda queries, labels: loss(queries, labels, None), argnums=(0, 1))
    assert flops.similarity_flops(5, rows, width, 1).step == products(
        jax.make_jaxpr(gradient)(queries, x).jaxpr
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_pairs_as_a_mask_has_them(causal, window):
    lengths = np.random.default_rng().integers(0, 12, 9)
    expected = 0
    for n in lengths:
        back = np.arange(n)[:, None] - np.arange(n)[None, :]
        seen = (back >= 0) if causal else np.ones((n, n), bool)
        expected += np.sum(seen & (np.abs(back) < window) if window else seen)
    assert flops.seen_pairs(lengths, causal=causal, window=window) == expected


def test_a_step_by_hand():
    """Two queries of 3 and 2 positions, two labels of which one is padding, of 4; a picture."""
    segments = np.array([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    image_at = np.full((2, 6), -1)
    image_at[0, 0] = 0
    blank = np.zeros((2, 6), np.int32)
    batch = Batch(
        PackedItems(blank, segments, blank, image_at, np.zeros((4, 10), np.float16)),
        np.array([5, 8]),
        np.array([3, -1]),
        np.zeros((2, 2), bool),
    )
    config = dataclasses.replace(BERT, num_layers=1)
    # 9 positions. Of a product there are two operations forwards and four backwards; of a pair of
    # positions two products, scores and weighted sums; of a picture no gradient.
    dense = 6 * 9 * (4 * 24 * 24 + 2 * 24 * 40)
    attention = 6 * 2 * 24 * (3 * 3 + 2 * 2 + 4 * 4)
    picture = 4 * 10 * 24
    assert flops.step_flops(config, None, batch) == dense + attention + picture + 6 * 2 * 1 * 24
    combiner = Combiner(num_heads=4, mlp_width=16)
    more = 6 * (3 * (4 * 24 * 24 + 2 * 24 * 16) + 2 * 3 * 3 * 24) + 6 * 2 * 1 * 24
    without = flops.step_flops(config, None, batch)
    assert flops.step_flops(config, combiner, batch) - without == more


def test_layers_that_slide_see_less():
    config = dataclasses.replace(DECODER, num_layers=6, window=4, global_every=3, causal=True)
    lengths = np.array([10])
    whole = flops.tower_flops(dataclasses.replace(config, window=0), lengths, 0).forward
    near = flops.tower_flops(config, lengths, 0).forward
    # Four of six layers slide: 10 + 9 + ... + 1 pairs become 1 + 2 + 3 + 7 times 4.
    assert whole - near == 4 * 4 * 6 * 8 * (55 - 34)


def test_a_published_decoder_by_hand():
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
