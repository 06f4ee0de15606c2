"""Embeddings of the images of queries, by the model that embedded the images of the run's data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.data.images import image_reader
from vixml_jax.serving.requests import Query


def ignored_images(
    width: int,
    embeddings: Float[np.ndarray, "j v"] | None,
    *,
    has_files: bool,
    reads_files: bool,
) -> str:
    """Returns why the images of a query are ignored; empty: they are not.

    Args:
      width: Width of the image embeddings that the model reads; 0: it reads none.
      embeddings: Of the query's images, if it has them.
      has_files: Whether the query has image files.
      reads_files: Whether the vision model is there that embedded the run's images.
    """
    if (has_files or embeddings is not None) and not width:
        return "images are ignored: the run was trained without images"
    if embeddings is not None and embeddings.shape[1] != width:
        return (
            f"the image is ignored: its embedding has width {embeddings.shape[1]}, expected {width}"
        )
    if has_files and not reads_files:
        return (
            "image files are ignored: the run's data came with image embeddings; pass embeddings "
            "of the same model"
        )
    return ""


class QueryImages:
    """Collects the image embeddings of queries, and embeds the image files that they name."""

    def __init__(self, width: int, finder: Any | None):
        """Prepares for the images that a run reads.

        Args:
          width: Width of the image embeddings that the model reads; 0: it reads none.
          finder: `ImageFinder` of the vision model that embedded the run's images; None: the data
            came with embeddings, so that image files cannot be embedded.
        """
        self._width, self._finder = width, finder if width else None

    def embed(self, queries: Sequence[Query]) -> tuple[list[np.ndarray | None], list[str]]:
        """Returns embeddings [j, v] or None for each query, and notes about ignored images.

        A note is empty where there is nothing to report.
        """
        vectors: list[np.ndarray | None] = [query.embeddings for query in queries]
        notes = [""] * len(queries)
        for i, query in enumerate(queries):
            notes[i] = ignored_images(
                self._width,
                query.embeddings,
                has_files=bool(query.images),
                reads_files=self._finder is not None,
            )
            if query.embeddings is not None and query.embeddings.shape[1] != self._width:
                vectors[i] = None
        named = [i for i, query in enumerate(queries) if query.images]
        if named and self._finder is not None:
            embedded = self._finder.embed("--queries", [queries[i].images for i in named])
            for i, rows in zip(named, embedded.rows, strict=True):
                read = np.asarray(embedded.vectors[rows[rows >= 0]], np.float16)
                given = vectors[i]  # A table may have embeddings beside images.
                vectors[i] = read if given is None else np.concatenate([given, read])
                names = map(image_reader.describe, queries[i].images)
                broken = [name for name in names if name in self._finder.broken]
                if broken:
                    unread = f"image {broken[0]}: {self._finder.broken[broken[0]]}"
                    notes[i] = f"{notes[i]}; {unread}" if notes[i] else unread
        return [x if x is not None and len(x) else None for x in vectors], notes
