"""Embeddings of images on disk: what is damaged is embedded again, or named."""

import hashlib
import os
import pathlib

import numpy as np
import pytest

from vixml_jax.data.images.embedding_store import EmbeddingStore, Outcome, Parts
from vixml_jax.errors import InputError
from vixml_jax.storage.resumable import Place

WIDTH, ABOUT = 3, {"model": "m"}
DIGESTS = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(6)]
VECTORS = np.arange(18, dtype=np.float16).reshape(6, WIDTH)


def opened(path, **options):
    return EmbeddingStore(str(path), width=WIDTH, about=ABOUT, **options)


def replace_line(path, number, line):
    lines = path.read_bytes().split(b"\n")
    lines[number] = line
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("line", [b"\xff" * 64, b"0" * 63, b"", b"g" * 64, DIGESTS[1].encode()])
def test_what_follows_a_damaged_digest_is_embedded_again(tmp_path, line, writable):
    opened(tmp_path).add(DIGESTS[:5], VECTORS[:5])
    replace_line(tmp_path / "digests.txt", 3, line)
    store = opened(tmp_path, writable=writable)
    assert list(store.row_of) == DIGESTS[:3]
    np.testing.assert_array_equal(store.vectors(), VECTORS[:3])
    if writable:
        store.add(DIGESTS[3:], VECTORS[3:])
        again = opened(tmp_path, writable=False)
        assert list(again.row_of) == DIGESTS
        np.testing.assert_array_equal(again.vectors(), VECTORS)


def test_a_store_without_vectors_has_none(tmp_path):
    opened(tmp_path).add(DIGESTS, VECTORS)
    os.remove(tmp_path / "vectors.f16")
    assert opened(tmp_path, writable=False).row_of == {}
    assert opened(tmp_path).row_of == {}


def parts_of(path, index):
    return Parts(str(path), Place("", index, 2), [f"{i}.png" for i in range(6)], 2, "same")


def embed(path):
    """Makes both parts, of images 0, 1, 4, 5 and 2, 3."""
    for index in range(2):
        parts = parts_of(path, index)
        parts.begin()
        own = parts.own_numbers()
        opened(parts.own).add([DIGESTS[i] for i in own], VECTORS[own])
        parts.complete(Outcome(DIGESTS[i]) for i in own)
    return parts


def test_parts_are_merged_in_the_order_of_the_images(tmp_path):
    parts = embed(tmp_path)
    assert parts.missing() == []
    store = opened(tmp_path)
    parts.merge(store, parts.outcomes(), width=WIDTH, about=ABOUT)
    assert list(store.row_of) == DIGESTS
    np.testing.assert_array_equal(store.vectors(), VECTORS)


@pytest.mark.parametrize("first", [b"", b"{", b"[]", b"\xff", b'{"of": 1}', b'{"of": "other"}'])
def test_a_part_whose_first_line_is_damaged_is_not_complete(tmp_path, first):
    parts = embed(tmp_path)
    replace_line(pathlib.Path(parts.own, "outcomes.jsonl"), 0, first)
    assert parts.missing() == [1]


@pytest.mark.parametrize("line", [b"", b"\xff", b"{", b'{"digest": "\xff"}', b'{"digest": 1}'])
def test_damaged_outcomes_are_named(tmp_path, line):
    parts = embed(tmp_path)
    replace_line(pathlib.Path(parts.own, "outcomes.jsonl"), 1, line)
    with pytest.raises(InputError, match=r"outcomes\.jsonl: .*; remove it and run process 1"):
        parts.outcomes()


def test_an_embedding_that_a_part_lacks_is_named(tmp_path):
    parts = embed(tmp_path)
    os.truncate(os.path.join(parts.own, "digests.txt"), 65)
    store = opened(tmp_path)
    with pytest.raises(InputError, match="part-00001-of-00002: lacks an embedding that it had"):
        parts.merge(store, parts.outcomes(), width=WIDTH, about=ABOUT)
    store.add(DIGESTS[3:4], VECTORS[3:4])  # Where the store has it, the part need not.
    parts.merge(store, parts.outcomes(), width=WIDTH, about=ABOUT)
    assert sorted(store.row_of) == sorted(DIGESTS)
