"""Packed items written by hand, position by position, for the tests of towers."""

import numpy as np
import pytest

from vixml_jax.structs import PackedItems


def _pack(items, rows, *, width, num_images=0, image_width=1):
    """Packs `items`, a list of (tokens, pictures), into `rows`, lists of item numbers."""
    shape = (len(rows), width)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments, image_at = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    images = np.zeros((len(items) * num_images, image_width), np.float16)
    for p, row in enumerate(rows):
        s = 0
        for item in row:
            words, pictures = items[item]
            for j, picture in enumerate(pictures[:num_images]):
                images[item * num_images + j] = picture
                image_at[p, s], segments[p, s], positions[p, s] = item * num_images + j, item, j
                s += 1
            for t, word in enumerate(words):
                tokens[p, s], segments[p, s], positions[p, s] = word, item, num_images + t
                s += 1
    return PackedItems(tokens, segments, positions, image_at, images)


@pytest.fixture(scope="session")
def pack():
    return _pack


@pytest.fixture(scope="session")
def draw_items():
    def draw(rng, num_items, *, vocab_size, longest, num_images=0, image_width=1):
        """Items of 1 to `longest` tokens (none the padding, 0) and 0 to `num_images` pictures."""
        return [
            (
                rng.integers(1, vocab_size, rng.integers(1, longest + 1)),
                rng.normal(size=(rng.integers(0, num_images + 1), image_width)).astype(np.float16),
            )
            for _ in range(num_items)
        ]

    return draw
