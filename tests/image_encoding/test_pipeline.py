"""Images are decoded ahead of the devices, within bounds; equal and broken ones are found."""

import hashlib
import threading
import time

import numpy as np
import pytest

from vixml_jax.data.images.embedding_store import EmbeddingStore, Outcome
from vixml_jax.image_encoding import pipeline

BATCH = 8


class FakeEncoder:
    """Embeds a file that holds a number as that number; its device and its decoder take time."""

    width = 2

    def __init__(self, decode_s=0.0, embed_s=0.0):
        self._decode_s, self._embed_s = decode_s, embed_s
        self._lock = threading.Lock()
        self.held = self.most_held = self.most_decoded = self.num_batches = 0
        self.decoded = []
        self.idle_s, self._free_at = 0.0, None  # Of the device, after its first batch.

    def pixels(self, source):
        time.sleep(self._decode_s)
        with open(source) as file:
            text = file.read()
        with self._lock:
            self.decoded.append(source)
            if not text.isdigit():
                return "broken"
            self.held += 1
            self.most_held = max(self.held, self.most_held)
        return np.full((2, 2, 3), int(text))

    def start(self, pixels, size):
        assert len(pixels) <= size == BATCH
        now = time.monotonic()
        if self._free_at is not None:
            self.idle_s += max(0.0, now - self._free_at)
        self._free_at = done = max(now, self._free_at or 0.0) + self._embed_s
        self.num_batches += 1

        def finish():
            time.sleep(max(0.0, done - time.monotonic()))
            with self._lock:
                self.held -= sum(one is not None for one in pixels)
            values = [0 if one is None else one[0, 0, 0] for one in pixels]
            vectors = np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)
            return vectors, np.array([value != 99 for value in values])  # 99 is not finite.

        return finish


@pytest.fixture
def files(tmp_path):
    """Writes numbers, or other texts, to a file each."""

    def write(texts):
        paths = [str(tmp_path / f"{i}.txt") for i in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            with open(path, "w") as file:
                file.write(str(text))
        return paths

    return write


def embed(encoder, sources, directory, known=()):
    store = EmbeddingStore(str(directory), width=2, about={})
    found = pipeline.embed_files(encoder, sources, store, known, batch=BATCH, threads=2)
    return store, found


def test_the_device_does_not_wait_for_the_host(files, tmp_path):
    encoder = FakeEncoder(decode_s=0.006, embed_s=0.03)
    _, found = embed(encoder, files(range(160)), tmp_path / "store")
    assert encoder.num_batches == 20 and len(found) == 160
    decoding_s = 20 * BATCH * 0.006 / 2  # By two threads, which is what a device would wait for.
    assert encoder.idle_s < 0.25 * decoding_s, encoder.idle_s


def test_decoding_ahead_is_bounded(files, tmp_path):
    encoder = FakeEncoder(embed_s=0.02)
    embed(encoder, files(range(300)), tmp_path / "store")
    most = pipeline.DECODED + pipeline.EMBEDDING
    assert 2 * BATCH < encoder.most_held <= most * BATCH


def test_each_content_is_embedded_once_in_order(files, tmp_path):
    rng = np.random.default_rng()
    texts = [str(x) for x in rng.integers(0, 98, 2000)]  # Of several chunks.
    for place, text in ((5, "broken"), (700, "broken"), (9, "99"), (1500, "99")):
        texts[place] = text
    paths = files(texts)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    known = {digests[i] for i in (0, 300, 1999)}
    encoder = FakeEncoder()
    store, found = embed(encoder, [*paths, "/no/file"], tmp_path / "store", known)
    expected = [x for x in dict.fromkeys(digests) if x not in known]
    invalid = {digests[5], digests[9]}
    assert [*store.row_of] == [x for x in expected if x not in invalid]
    number_of = dict(zip(digests, texts, strict=True))
    np.testing.assert_array_equal(store.vectors()[:, 1], [int(number_of[x]) for x in store.row_of])
    assert len(encoder.decoded) == len(expected)
    for path, digest, text in zip(paths, digests, texts, strict=True):
        if digest in invalid:
            assert found[path].fault == {"99": pipeline.NOT_FINITE}.get(text, "broken")
        else:
            assert found[path] == Outcome(digest=digest)
    assert found["/no/file"] == Outcome(fault="cannot be read: no such file")
    again = FakeEncoder()
    store, _ = embed(again, paths, tmp_path / "store", known)
    assert len(again.decoded) == len(invalid) and not again.num_batches < 1


def test_nothing_is_left_running_if_it_ends_early(files, tmp_path):
    encoder = FakeEncoder(decode_s=0.01)
    encoder.start = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        embed(encoder, files(range(400)), tmp_path / "store")
    assert len(encoder.decoded) <= (pipeline.DECODED + 1) * BATCH
