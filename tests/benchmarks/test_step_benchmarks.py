"""The benchmarks beside torch, on a tiny tower: every program runs, on the texts it should."""

import numpy as np
import pytest

from vixml_jax.benchmarks import encode, inputs, packing, train_step
from vixml_jax.data import preparation

SETTINGS = {"batch": 16, "steps": 2, "threads": 1, "texts": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("raw")
    words = np.array([f"w{n}" for n in range(30)])
    for split, count in (("trn", 40), ("tst", 5), ("lbl", 30)):
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        (root / f"{split}.raw.txt").write_text("".join(text + "\n" for text in texts))
        if split != "lbl":
            rows = [" ".join(f"{j}:1" for j in rng.choice(30, 2, replace=False)) for _ in texts]
            (root / f"{split}_X_Y.txt").write_text(f"{count} 30\n" + "\n".join(rows) + "\n")
    preparation.prepare(str(root), str(root / "out"), tokenizer="train", max_tokens=16)
    return str(root / "out")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4, "intermediate_size": 32}  # fmt: skip
    monkeypatch.setattr(train_step, "MINILM", {**train_step.MINILM, **sizes})


@pytest.mark.parametrize("program", train_step.PROGRAMS)
def test_a_round_of_training(program, data):
    about, run = train_step.prepare(program, {**SETTINGS, "data": data})
    assert about == {"program": program}
    assert 0 < run()["loss"] < 3


@pytest.mark.parametrize("program", encode.PROGRAMS)
def test_a_round_of_encoding(program, data):
    about, run = encode.prepare(program, {**SETTINGS, "data": data})
    assert about == {"texts": 20}
    assert np.isfinite(run()["sum"])


def test_full_texts_have_32_tokens(data):
    full = train_step.data_of({"data": data}, full=True)
    for items in (full.train, full.test, full.labels):
        assert set(np.diff(items.tokens.offsets)) == {32}
    plain = inputs.open_data(data)
    first = plain.train.tokens.values[: plain.train.tokens.offsets[1]]
    np.testing.assert_array_equal(full.train.tokens.values[:32], np.resize(first, 32))


def test_packing_counts_what_is_empty(data):
    items = inputs.open_data(data).train
    found = packing.measure(items, batch=40, num_images=0)
    lengths = np.diff(items.tokens.offsets)
    assert found["padded to 32, text alone"][1] == pytest.approx(1 - lengths.sum() / (40 * 32))
    seconds, empty = found["packed"]
    assert seconds > 0 and 0 <= empty < 0.3
