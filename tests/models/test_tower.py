"""The tower: images as tokens, pooling by segment, independence of items in a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from vixml_jax.models import hf_checkpoints, layers
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.tower import Tower
from vixml_jax.structs import PackedItems

CONFIG = BertConfig(
    vocab_size=40, num_layers=2, width=16, num_heads=4, mlp_width=24, max_positions=20,
    image_width=7, initializer_range=0.3,
)  # fmt: skip


@functools.cache
def _init(config):
    row = np.zeros((1, 2), np.int32)
    packed = PackedItems(row, row, row, row - 1, np.zeros((0, 1), np.float16))
    make = jax.jit(lambda: Tower(config).init(jax.random.key(0), packed, 1, deterministic=True))
    return nn.unbox(make())["params"]


def init(config):
    """Initial parameters, in a dict that the caller may change."""
    return dict(_init(config))


@functools.cache
def _compiled(config, num_items):
    return jax.jit(
        lambda params, packed: Tower(config).apply(
            {"params": params}, packed, num_items, deterministic=True
        )
    )


def vectors(config, params, packed, num_items):
    return np.asarray(_compiled(config, num_items)(params, packed))


def test_images_enter_as_tokens(tmp_path, pack, draw_items):
    torch.manual_seed(0)
    hf_config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertModel(hf_config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    config, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    config = dataclasses.replace(config, image_width=7)
    rng = np.random.default_rng(0)
    items = draw_items(rng, 8, vocab_size=40, longest=8, num_images=3, image_width=7)
    assert len({len(item_images) for _, item_images in items}) > 2
    packed = pack(items, [[4, 2], [1, 0, 3], [5], [6, 7]], width=30, num_images=3, image_width=7)
    linear = torch.nn.Linear(7, 16)
    weights = rng.normal(size=(8, 16)).astype(np.float32)

    means = []
    for tokens, item_images in items:
        embedded = torch.cat(
            [
                linear(torch.tensor(item_images).float()),
                model.embeddings.word_embeddings(torch.tensor(tokens)),
            ]
        )
        # Positions of the text start after those of all images, also if images are missing.
        positions = [*range(len(item_images)), *range(3, 3 + len(tokens))]
        states = model(inputs_embeds=embedded[None], position_ids=torch.tensor([positions]))
        means.append(states.last_hidden_state[0].mean(0))
    means = torch.stack(means)
    torch.sum(means * torch.tensor(weights)).backward()

    params["image_projection"] = {
        "kernel": linear.weight.detach().numpy().T, "bias": linear.bias.detach().numpy(),
    }  # fmt: skip
    found = vectors(config, params, packed, 8)
    np.testing.assert_allclose(found, means.detach().numpy(), atol=1e-5)

    def objective(params):
        return jnp.sum(
            Tower(config).apply({"params": params}, packed, 8, deterministic=True) * weights
        )

    gradients = jax.jit(jax.grad(objective))(params)
    projection = gradients["image_projection"]
    np.testing.assert_allclose(projection["kernel"].T, linear.weight.grad, atol=2e-5)
    np.testing.assert_allclose(projection["bias"], linear.bias.grad, atol=2e-5)
    embeddings = model.embeddings.word_embeddings.weight.grad
    np.testing.assert_allclose(gradients["word_embeddings"], embeddings, atol=2e-5)


@pytest.mark.parametrize("seed", range(5))
def test_items_in_the_same_row_do_not_affect_each_other(seed, pack, draw_items):
    rng = np.random.default_rng(seed)
    settings = {"width": 30, "num_images": 2, "image_width": 7}
    items = draw_items(rng, 6, vocab_size=40, longest=12, num_images=2, image_width=7)
    alone = pack(items, [[i] for i in range(6)], **settings)
    params = init(CONFIG)
    expected = vectors(CONFIG, params, alone, 6)
    assert np.linalg.norm(expected, axis=1).min() > 0.1

    rows, space = [[] for _ in range(6)], [30] * 6  # As many rows as above, for one program.
    for item in rng.permutation(6):
        length = sum(map(len, items[item]))
        row = rng.choice([r for r in range(6) if space[r] >= length and r < 4])
        rows[row].append(int(item))
        space[row] -= length
    shared = pack(items, rows, **settings)
    assert max(map(len, rows)) > 1
    np.testing.assert_allclose(vectors(CONFIG, params, shared, 6), expected, atol=2e-6)
    # Neither does the order of the positions in a row.
    order = rng.permutation(30)
    mixed = shared._replace(
        **{
            name: np.asarray(getattr(shared, name))[:, order]
            for name in ("tokens", "segments", "positions", "image_at")
        }
    )
    np.testing.assert_allclose(vectors(CONFIG, params, mixed, 6), expected, atol=2e-6)


def test_absent_items_are_zero_with_finite_gradients(pack):
    packed = pack([([], []), ([3, 4], []), ([], [])], [[1], []], width=5, image_width=7)
    params = init(CONFIG)
    found = vectors(CONFIG, params, packed, 3)
    assert np.all(found[[0, 2]] == 0) and np.all(found[1] != 0)
    gradients = jax.jit(
        jax.grad(
            lambda p: Tower(CONFIG).apply({"params": p}, packed, 3, deterministic=True)[1].sum()
        )
    )(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert not np.any(gradients["image_projection"]["kernel"])


@pytest.mark.parametrize("image_width", [1, 7])
def test_a_batch_without_images(image_width, pack, draw_items):
    items = draw_items(np.random.default_rng(0), 3, vocab_size=40, longest=6)
    rows = [[0, 1], [2]]
    none = pack(items, rows, width=12, num_images=0, image_width=image_width)
    assert none.images.shape == (0, image_width)
    params = init(CONFIG)
    assert params["image_projection"]["kernel"].shape == (7, 16)
    absent = none._replace(images=np.zeros((6, 7), np.float16))
    found = vectors(CONFIG, params, none, 3)
    np.testing.assert_array_equal(found, vectors(CONFIG, params, absent, 3))
    text = dataclasses.replace(CONFIG, image_width=0)
    assert "image_projection" not in init(text)
    del params["image_projection"]
    np.testing.assert_array_equal(found, vectors(text, params, none, 3))


def test_image_projection_is_initialised_as_torch_linear():
    config = dataclasses.replace(CONFIG, width=64, image_width=100)
    for leaf in init(config)["image_projection"].values():
        assert np.abs(leaf).max() <= 0.1
        np.testing.assert_allclose(np.std(leaf), 0.1 / 3**0.5, rtol=0.15)


def test_sums_by_segment_match_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 9, 5)).astype(np.float32)
    segments = rng.integers(-1, 7, (4, 9))
    segments[segments == 3] = 4
    expected = [x[segments == item].astype(np.float64).sum(0) for item in range(7)]
    found, count = layers.sum_by_segment(jnp.asarray(x), jnp.asarray(segments), 7)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(count, [np.sum(segments == item) for item in range(7)])
    half, _ = layers.sum_by_segment(jnp.asarray(x, jnp.bfloat16), jnp.asarray(segments), 7)
    assert half.dtype == jnp.float32


def test_the_last_position_of_each_segment():
    segments = jnp.array([[0, 0, 2, -1, -1], [1, 1, 1, 3, 3]])
    expected = [[-1, 0, 2, -1, -1], [-1, -1, 1, -1, 3]]
    np.testing.assert_array_equal(layers.last_of_segments(segments), expected)


@pytest.mark.parametrize("kind", layers.POOLINGS)
def test_pooled_states_match_numpy(kind):
    rng = np.random.default_rng()
    states = rng.normal(size=(3, 12, 5)).astype(np.float32)
    segments, positions = np.full((3, 12), -1), np.zeros((3, 12), int)
    image_at, expected = np.full((3, 12), -1), np.zeros((6, 5))
    for item in range(6):
        row, first, length = item // 2, 6 * (item % 2), rng.integers(2, 7)
        at = slice(first, first + length)
        num_images = rng.integers(0, length)  # In front of the text, as in an encoder.
        segments[row, at] = item
        # Positions of the text leave space for missing images.
        positions[row, at] = np.r_[:num_images, 6 : 6 + length - num_images]
        image_at[row, first : first + num_images] = 1
        x = states[row, at].astype(np.float64)
        ranks = np.arange(1, length + 1)
        expected[item] = {
            "mean": x.mean(0),
            "cls": x[num_images],
            "last": x[-1],
            "weighted_mean": ranks @ x / ranks.sum(),
        }[kind]
    order = np.arange(12) if kind == "last" else rng.permutation(12)
    states, segments, positions, image_at = (
        jnp.asarray(x[:, order]) for x in (states, segments, positions, image_at)
    )
    weights = layers.pooling_weights(kind, segments, positions, image_at)
    total, count = layers.sum_by_segment(states, segments, 6, weights)
    np.testing.assert_allclose(total / count[:, None], expected, atol=1e-5)


def test_an_unknown_pooling_is_refused():
    row = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="'max': expected one of mean, cls"):
        layers.pooling_weights("max", row, row, row)


def test_unsupported_einsum_equations_are_refused():
    layer = layers.Einsum("psd,dm->pms", {"d": 2, "m": 3}, nn.initializers.zeros)
    with pytest.raises(ValueError, match="psd,dm->pms"):
        layer.init(jax.random.key(0), jnp.zeros((1, 1, 2)))
