"""Tests of the built-in data set of characters."""

import unicodedata

import numpy as np
import pytest

from vixml_jax.data.sources import glyphs


@pytest.fixture(scope="module")
def raw():
    return glyphs.make(0)


def texts_of(items):
    return [text for chunk in items.read_texts() for text in chunk]


def test_sizes_and_split(raw):
    assert 4500 < raw.train.items.count < 5100
    assert 0.78 < raw.train.items.count / (raw.train.items.count + raw.test.items.count) < 0.83
    assert 700 < raw.labels.count < 1000
    for items, relevance in (
        (raw.train.items, raw.train.relevance),
        (raw.test.items, raw.test.relevance),
    ):
        assert relevance.shape == (items.count, raw.labels.count)
        assert len(texts_of(items)) == items.count == len(items.images.embeddings)
        assert np.all(np.diff(relevance.indptr) > 0)


def test_labels_are_neither_rare_nor_too_frequent(raw):
    counts = np.bincount(raw.train.relevance.indices, minlength=raw.labels.count)
    assert counts.min() >= 2
    # 5 % of all training characters, of which a few have no label and are left out.
    assert counts.max() <= 0.05 * raw.train.items.count * 1.1
    labels = texts_of(raw.labels)
    assert labels == sorted(set(labels))
    assert not {"letter", "small"} & set(labels)
    assert "circumflex" in labels


def test_texts_and_labels_match_unicode_names(raw):
    labels = texts_of(raw.labels)
    possible = set()
    for code in range(0x20000):
        name = unicodedata.name(chr(code), "").lower().split()
        if name:
            category = glyphs._CATEGORIES[unicodedata.category(chr(code))]
            possible.add((f"{name[0]} {category}", frozenset(name[1:]) & set(labels)))
    relevance = raw.test.relevance
    for row, text in enumerate(texts_of(raw.test.items)):
        columns = relevance.indices[relevance.indptr[row] : relevance.indptr[row + 1]]
        assert (text, frozenset(labels[column] for column in columns)) in possible


def test_images_have_unit_length_and_no_mean(raw):
    images = raw.train.items.images
    assert images.embeddings.dtype == np.float16 and images.embeddings.shape[1:] == (3, 1024)
    length = np.linalg.norm(images.embeddings.astype(np.float32), axis=2)
    np.testing.assert_allclose(length[images.present], 1.0, atol=2e-3)
    assert np.all(length[~images.present] == 0.0)
    assert images.present[:, 0].mean() > 0.98 and 0.7 < images.present[:, 2].mean() < 1.0
    mean = images.embeddings[images.present].astype(np.float32).mean(axis=0)
    assert np.linalg.norm(mean) < 0.2


def test_data_depend_on_the_seed_only(raw):
    again, other = glyphs.make(0), glyphs.make(1)
    np.testing.assert_array_equal(
        again.train.items.images.embeddings, raw.train.items.images.embeddings
    )
    assert (again.train.relevance != raw.train.relevance).nnz == 0
    assert texts_of(again.test.items) == texts_of(raw.test.items)
    assert texts_of(other.train.items) != texts_of(raw.train.items)
