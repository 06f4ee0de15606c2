"""Vectors of queries: texts are tokenized, packed in batches of few shapes, and encoded."""

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.data.store import Items, Ragged
from vixml_jax.modeling import Model
from vixml_jax.models import layers
from vixml_jax.parallel import sharding
from vixml_jax.search import index as index_lib
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.serving.batching import BatchPlanner
from vixml_jax.serving.query_items import ItemReader
from vixml_jax.structs import Queries

_COMPILED_AT_ONCE = 3  # Programs, and the search; each takes memory while it is compiled.


class QueryEncoder:
    """Encodes queries with a run's tower, and for its label head; several threads may use it.

    Attributes:
      model, params: The model; unrolled blocks of the tower may be `layers.unstacked`.
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
        if model.mesh.devices.flat[0].platform == "cpu" and not model.tower.config.scan:
            self.params = {**params, "tower": layers.unstacked(params["tower"])}
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
        vectors = np.empty((len(items), self.model.table.width), np.float32)
        for rows in self.planner.batches(len(items)):
            batch = self.planner.pack(items, rows)
            packed = sharding.to_devices(batch.packed, self.model.mesh)
            found = self.model.encode_packed(self.params, packed, batch.size)
            vectors[rows] = np.asarray(found)[batch.at]
        return vectors

    def queries(self, items: Items) -> Queries:
        """Returns unit vectors of queries, and those for the label head if the run has one."""
        vectors = self.encode(items)
        if "head" not in self.params:
            return Queries(vectors)
        return Queries(vectors, self.head_queries(vectors, items.tokens))

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

        vectors = np.empty((len(items), self.model.table.width), np.float32)
        for rows in self.planner.batches(len(items)):
            batch = self.planner.pack(items, rows)
            inputs = np.zeros((2, batch.size, self.model.table.width), np.float32)
            inputs[:, batch.at] = free[rows], centroids[rows]
            arguments = sharding.to_devices((batch.packed, *inputs), self.model.mesh)
            found = self.model.new_prototypes(self.params, *arguments)
            vectors[rows] = np.asarray(found)[batch.at]
        return vectors

    def warm_up(self, search: Callable[[Queries], object]) -> None:
        """Compiles the programs for any number of queries, so that none waits.

        Those of the tower are not run: on a CPU, that would take longer than to compile them, or to
        load them from the compilation cache.

        Args:
          search: Searches for the labels of queries.
        """
        model, items = self.model, self.items([""])

        def search_all_sizes() -> None:
            for size in index_lib.padded_sizes(self.planner.max_size):
                vectors = np.zeros((size, model.table.width), np.float32)
                no_tokens = Ragged(items.tokens.values, np.zeros(size + 1, np.int64))
                head = self.head_queries(vectors, no_tokens) if "head" in self.params else None
                search(Queries(vectors, head))

        # Programs are traced here, one after the other, and compiled in the other threads.
        with futures.ThreadPoolExecutor(_COMPILED_AT_ONCE) as threads:
            started = [threads.submit(search_all_sizes)]
            for shape in self.planner.shapes:
                batch = self.planner.empty(items, shape)
                packed = sharding.abstract_on_devices(batch.packed, model.mesh)
                traced = model.trace_encoding(self.params, packed, batch.size)
                # A later call with these shapes finds the program.
                started.append(threads.submit(traced.lower().compile))
            for one in started:
                one.result()
