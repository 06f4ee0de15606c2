"""Images of queries: several processes add embeddings to one store."""

import os
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vixml_jax.data.images.download import DownloadSettings
from vixml_jax.image_encoding.finder import ImageFinder
from vixml_jax.storage import locks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_siglip(tmp_path_factory.mktemp("siglip"), 16, 8, width=12)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (5, 9, 3), np.uint8)).save(root / f"{i}.png")
    return [str(root / f"{i}.png") for i in range(12)]


def finder(model, directory):
    return ImageFinder(
        str(model), str(directory), keep_aspect=False, batch=2, dtype="float32",
        bounds=DownloadSettings(),
    )  # fmt: skip


def vectors(one, paths):
    """Embeddings of queries with an image each."""
    embedded = one.embed("queries", [[path] for path in paths])
    return np.array(embedded.vectors[embedded.rows[:, 0]], np.float32)


def test_what_another_process_has_added_is_used(model, paths, tmp_path):
    expected = vectors(finder(model, tmp_path / "alone"), paths)
    assert len(np.unique(expected, axis=0)) == len(paths)
    one, other = finder(model, tmp_path / "both"), finder(model, tmp_path / "both")
    for begin, who in enumerate((one, other, one, one, other)):
        rows = slice(2 * begin, 2 * begin + 4)  # Two of them are there already.
        np.testing.assert_allclose(vectors(who, paths[rows]), expected[rows], atol=2e-3)
    digests = (tmp_path / "both" / "digests.txt").read_text().split()
    assert len(digests) == len(set(digests)) == len(paths)
    assert sorted(os.listdir(tmp_path / "both")) == ["about.json", "digests.txt", "vectors.f16"]
    third = finder(model, tmp_path / "both")  # Reads all from the disk.
    np.testing.assert_allclose(vectors(third, paths), expected, atol=2e-3)


def test_embedding_waits_for_another_process(model, paths, tmp_path):
    one = finder(model, tmp_path)
    with futures.ThreadPoolExecutor(1) as pool:
        with locks.exclusive(str(tmp_path), doing="embedding"):
            waiting = pool.submit(vectors, one, paths)
            with pytest.raises(futures.TimeoutError):
                waiting.result(timeout=0.5)
            assert not (tmp_path / "vectors.f16").exists()
        assert len(waiting.result(timeout=300)) == len(paths)
