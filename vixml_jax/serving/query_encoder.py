"""Vectors of queries: texts are tokenized, packed in batches of few shapes, and encoded."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from vixml_jax.data.store import Items, Ragged
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.serving.batching import Batch, BatchPlanner
from vixml_jax.serving.query_items import ItemReader
from vixml_jax.structs import PackedItems, Queries


def padded(block: Num[np.ndarray, "b ..."], size: int) -> Num[np.ndarray, "n ..."]:
    """The rows, and zeros behind them up to `size` rows, so that few programs are compiled."""
    return np.pad(block, ((0, size - len(block)), *((0, 0),) * (block.ndim - 1)))


class QueryEncoder:
    """Encodes queries with a run's tower, and for its label head; several threads may use it.

    Attributes:
      model, params: The model.
      planner: Decides on the batches.
      image_width: Width of the image embeddings that the model reads; 0: it reads none.
    """

    def __init__(self, model: Model, params: Any, artifacts: ServingArtifacts):
        """Loads the tokenizer.

        Args:
          model, params: The model; parameters of its label head make `queries` read it.
          artifacts: Serving artifacts of the run.
        """
        self.model, self.params = model, params
        tower, about = model.tower.config, artifacts.about
        self.image_width = tower.image_width if model.layout.num_images else 0
        self._reader = ItemReader(artifacts.path, about.max_tokens, self.image_width)
        self._max_tokens = about.max_tokens
        self.planner = BatchPlanner(
            num_shards=sharding.num_row_shards(model.mesh),
            row_width=model.row_width,
            layout=model.layout,
            mean_tokens=about.mean_tokens,
            max_tokens=about.max_tokens,
        )

    def items(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Returns texts and images in the form of prepared data.

        Raises:
          InputError: If texts or images are malformed.
        """
        return self._reader.read(texts, images)

    def has_only_unknown_tokens(self, items: Items) -> list[bool]:
        """Whether the text of each item has tokens, none of which the tokenizer knows."""
        return self._reader.has_only_unknown_tokens(items)

    def encode(self, items: Items) -> Float[np.ndarray, "q e"]:
        """Returns unit vectors of queries."""

        def run(packed: PackedItems, batch: Batch) -> Any:
            packed = sharding.to_devices(packed, self.model.mesh)
            return self.model.encode_packed(self.params, packed, batch.size)

        return self._in_batches(run, items)

    def queries(self, items: Items) -> Queries:
        """Returns unit vectors of queries, and those for the label head if the run has one."""
        return self._with_head(self.encode(items), items.tokens)

    def _with_head(self, vectors: Float[np.ndarray, "q e"], tokens: Ragged) -> Queries:
        """Unit vectors of queries, and those for the label head if the run has one."""
        if "head" not in self.params:
            return Queries(vectors)
        head = np.empty_like(vectors)
        for batch in self.planner.batches(len(vectors)):
            offsets = tokens.offsets[batch.rows.start : batch.rows.stop + 1]
            of_block = Ragged(tokens.values, np.pad(offsets, (0, batch.padding), "edge"))
            block = padded(vectors[batch.rows], batch.size)
            head[batch.rows] = self.head_queries(block, of_block)[: batch.count]
        return Queries(vectors, head)

    def head_queries(
        self, vectors: Float[np.ndarray, "q e"], tokens: Ragged
    ) -> Float[np.ndarray, "q e"]:
        """Returns the vectors with which the label head scores queries.

        Args:
          vectors: Unit vectors of the queries.
          tokens: Their tokens.
        """
        return self.model.head_queries(self.params, vectors, tokens)

    def prototypes(
        self,
        items: Items,
        free: Float[np.ndarray, "m e"],
        centroids: Float[np.ndarray, "m e"],
    ) -> Float[np.ndarray, "m e"]:
        """Returns unit prototypes of new labels, from their content and the combiner's inputs."""

        def run(packed: PackedItems, batch: Batch) -> Any:
            inputs = (padded(x[batch.rows], batch.size) for x in (free, centroids))
            arguments = sharding.to_devices((packed, *inputs), self.model.mesh)
            return self.model.new_prototypes(self.params, *arguments)

        return self._in_batches(run, items)

    def _in_batches(
        self, run: Callable[[PackedItems, Batch], Any], items: Items
    ) -> Float[np.ndarray, "q e"]:
        """Packs items in batches and concatenates the vectors that `run` returns for them."""
        vectors = np.empty((len(items), self.model.table.width), np.float32)
        for batch in self.planner.batches(len(items)):
            packed = self.planner.pack(items, batch)
            vectors[batch.rows] = np.asarray(run(packed, batch))[: batch.count]
        return vectors

    def warm_up(self, search: Callable[[Queries], object], max_queries: int) -> None:
        """Compiles the programs for up to `max_queries` queries, so that none waits.

        Those of the tower are not run: on a CPU, that would take longer than to compile them, or to
        load them from the compilation cache.

        Args:
          search: Searches for the labels of queries.
          max_queries: Queries of a call.
        """
        layout, planner = self.model.layout, self.planner
        image = np.zeros((layout.num_images, self.image_width)) if self.image_width else None
        beside_words = layout.overhead + self._reader.num_special - sum(layout.trim)
        max_size = planner.size_for(max_queries)
        for size in (size for size in planner.sizes if size <= max_size):
            for words in (1, *(width - beside_words for width in planner.widths)):
                items = self._compile("a " * max(1, words), None, size)
            self._compile("a " * self._max_tokens, image, size)
            vectors = np.zeros((size, self.model.table.width), np.float32)
            search(self._with_head(vectors, items.tokens))

    def _compile(self, text: str, image: Float[np.ndarray, "j v"] | None, size: int) -> Items:
        """Compiles the program that encodes a batch of equal items, and returns the items."""
        items = self.items([text] * size, None if image is None else [image] * size)
        packed = self.planner.pack(items, Batch(slice(0, size), size))
        packed = sharding.to_devices(packed, self.model.mesh)
        # A later call with these shapes finds the program.
        self.model.trace_encoding(self.params, packed, size).lower().compile()
        return items
