"""Fixtures that pack items position by position, for the tests of the towers."""

import numpy as np
import pytest

from vixml_jax.structs import PackedItems


def _pack(items, rows, *, width, num_images=0, image_width=1):
    """Packs `items`, a list of (tokens, images), into `rows`, lists of item numbers."""
    shape = (len(rows), width)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments, image_at = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    images = np.zeros((len(items) * num_images, image_width), np.float16)
    for p, row in enumerate(rows):
        s = 0
        for item in row:
            token_ids, item_images = items[item]
            for j, image in enumerate(item_images[:num_images]):
                images[item * num_images + j] = image
                image_at[p, s], segments[p, s], positions[p, s] = item * num_images + j, item, j
                s += 1
            for t, token_id in enumerate(token_ids):
                tokens[p, s], segments[p, s], positions[p, s] = token_id, item, num_images + t
                s += 1
    return PackedItems(tokens, segments, positions, image_at, images)


@pytest.fixture(scope="session")
def pack():
    return _pack


@pytest.fixture(scope="session")
def draw_items():
    def draw(rng, num_items, *, vocab_size, longest, num_images=0, image_width=1):
        """Items of 1 to `longest` tokens (never padding, 0) and 0 to `num_images` images."""
        return [
            (
                rng.integers(1, vocab_size, rng.integers(1, longest + 1)),
                rng.normal(size=(rng.integers(0, num_images + 1), image_width)).astype(np.float16),
            )
            for _ in range(num_items)
        ]

    return draw
