"""What the label head reads of the words of a query."""

import jax
import numpy as np
import optax
import pytest

from vixml_jax.data import packing
from vixml_jax.data.store import Ragged
from vixml_jax.labels import head_update, head_words
from vixml_jax.labels.head import LabelHead
from vixml_jax.parallel import sharding
from vixml_jax.structs import Positives


def random_texts(rng, count, longest):
    texts = [
        rng.integers(0, 2**31 - 1, rng.integers(0, longest + 1)).tolist() for _ in range(count)
    ]
    return texts, np.array([t + [-1] * (longest - len(t)) for t in texts], np.int32)


def test_sums_and_their_gradient():
    rng = np.random.default_rng()
    texts, tokens = random_texts(rng, 40, 7)
    table, weights = rng.normal(size=(23, 5)), rng.normal(size=(40, 5))
    expected, gradient = np.zeros((40, 5)), np.zeros_like(table)
    for at, text in enumerate(texts):
        rows = [token % 23 for token in text]
        for row in rows:
            expected[at] += table[row] / len(text) ** 0.5
            gradient[row] += weights[at] / len(text) ** 0.5
    table = table.astype(np.float32)
    np.testing.assert_allclose(head_words.add_up(table, tokens), expected, atol=1e-5)
    found = jax.grad(lambda table: (head_words.add_up(table, tokens) * weights).sum())(table)
    np.testing.assert_allclose(found, gradient, atol=1e-4)


@pytest.mark.parametrize("trim", [(0, 0), (1, 2)])
def test_tokens_of_texts(trim):
    rng = np.random.default_rng()
    lengths = rng.integers(sum(trim), 12, 30)
    values = rng.integers(0, 99, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(-1, 30, 50)
    found = packing.text_tokens(
        Ragged(values, offsets), ids, layout=packing.Layout(trim=trim), length=5
    )
    assert found.dtype == np.int32
    for row, at in zip(found, ids, strict=True):
        text = values[offsets[at] + trim[0] : offsets[at + 1] - trim[1]][:5] if at >= 0 else []
        assert row.tolist() == [*text, *[-1] * (5 - len(text))]


@pytest.mark.parametrize("loss", [pytest.param("softmax", marks=pytest.mark.slow), "bce"])
def test_words_learn_by_the_gradient_of_the_loss(loss):
    """A step by plain gradient descent equals the gradient of the loss, on eight devices."""
    rng = np.random.default_rng()
    head = LabelHead(sharding.create_mesh(), 30, 8, 4, loss, num_words=19)
    params = {
        "vectors": rng.normal(size=(32, 8)), "bias": rng.normal(size=32),
        "mlp": {"up": {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)},
                "down": {"kernel": rng.normal(size=(4, 8)), "bias": rng.normal(size=8)}},
        "words": rng.normal(size=(19, 8)),
    }  # fmt: skip
    params = jax.tree.map(np.float32, params)
    q = rng.normal(size=(16, 8)).astype(np.float32)
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    _, tokens = random_texts(rng, 16, 6)
    positives = Positives(np.arange(16, dtype=np.int32), rng.integers(0, 30, 16).astype(np.int32))
    batch = sharding.to_devices((q, positives, np.ones(16, bool), tokens), head.mesh)
    q, positives, mask, tokens = batch
    gradient = jax.grad(head.loss_of)(params, q, positives, mask, None, tokens)
    assert np.abs(gradient["words"]).max() > 1e-3
    sgd = optax.sgd(1.0)
    stepped, _, _ = head_update.update(
        head, {"head": params}, sgd.init({"head": params}), q, positives, mask, sgd, None, tokens
    )
    expected = jax.tree.map(lambda x, d: x - d, params, gradient)
    for name in ("words", "vectors"):
        np.testing.assert_allclose(stepped["head"][name], expected[name], atol=1e-5)
