"""Vectors of a run's labels and queries, each encoded once, and the search by any scoring."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.augmentation.settings import Scoring
from vixml_jax.data.store import PreparedDataset
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed, sharding
from vixml_jax.parallel.distributed import Group
from vixml_jax.search import fusion as fusion_lib
from vixml_jax.search import index as index_lib
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.index import Index
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import LabelState, Queries, SearchResult, Shard


@dataclasses.dataclass(frozen=True)
class ScoredSearch:
    """Vectors of a model's labels and queries, and the search with them.

    Attributes:
      model, params, label_state: The model. It has a label head if `params` have one.
      dataset: Prepared data of the run.
      block: Items encoded at a time.
      vectors: Vectors of this model and data: what it has is not encoded again, and what is encoded
        is added. None: everything is encoded.
      titles: Whether to show progress.
      group: The processes of the model's mesh.
    """

    model: Model
    params: Any
    label_state: LabelState
    dataset: PreparedDataset
    block: int
    vectors: VectorStore | None
    titles: bool
    group: Group

    def check(self, scoring: Scoring) -> Scoring:
        """Returns the scoring, without fusion if the model has no label head (yet)."""
        if "head" not in self.params:
            return Scoring(mixing=scoring.mixing)
        if scoring.fusion is None:
            raise ValueError("the model has a label head: expected scoring.fusion")
        return scoring

    def labels(self) -> Shard:
        """Unit prototypes of the labels."""
        ids = sharding.row_ids(self.dataset.num_labels, self.model.mesh)

        def encode() -> Float[np.ndarray, "m e"]:
            title = "labels" if self.titles else ""
            return self.model.encode_labels(
                self.params, self.label_state, self.dataset.labels, block=self.block, title=title
            ).values

        return Shard(ids, self._kept("labels", encode, len(ids)))

    def queries(self, split: str) -> Queries:
        """The queries of a split, of all processes."""
        vectors = self.vectors_of(split)
        if "head" not in self.params:
            return Queries(vectors)
        tokens = getattr(self.dataset, split).tokens
        return Queries(vectors, self.model.head_queries(self.params, vectors, tokens))

    def vectors_of(self, split: str) -> Float[np.ndarray, "n e"]:
        """Unit vectors of the queries of a split, of all processes."""
        items = getattr(self.dataset, split)

        def encode() -> Float[np.ndarray, "n e"]:
            title = f"{'training' if split == 'train' else split} queries" if self.titles else ""
            shard = self.model.encode_queries(self.params, items, block=self.block, title=title)
            return distributed.gather_rows(shard, len(items), self.group)

        return self._kept(split, encode, len(items))

    def _kept(
        self, name: str, encode: Callable[[], Float[np.ndarray, "n e"]], rows: int
    ) -> Float[np.ndarray, "n e"]:
        if self.vectors is None:
            return encode()
        return self.vectors.get_or_make(name, encode, rows, self.model.table.width)

    def label_rows(self, prototypes: Shard) -> Shard:
        """Vectors of the labels as they are searched: fused with the head if there is one."""
        if "head" not in self.params:
            return prototypes
        vectors, bias = self.model.head_rows(self.params)
        log_count = fusion_lib.log_counts(self.dataset.train_relevance)[prototypes.ids]
        head = fusion_lib.HeadRows(vectors.values, bias.values, log_count)
        values = fusion_lib.LabelRows(prototypes.values, head)
        return prototypes._replace(values=values)

    def search_vectors(self, queries: Queries, fusion: Fusion | None) -> Float[np.ndarray, "q w"]:
        """Vectors of queries as they search: fused with the head, unless `fusion` is None."""
        if fusion is None:
            return queries.vectors
        return fusion_lib.query_vectors(*queries, fusion)

    def search(
        self,
        index: Index,
        queries: Queries,
        pairs: Int[np.ndarray, "f 2"],
        k: int,
        fusion: Fusion | None,
    ) -> SearchResult:
        """Returns the k best labels of queries, without filter pairs.

        Scores are cosines, or probabilities if `fusion` is given.
        """
        vectors = self.search_vectors(queries, fusion)
        return index_lib.search_filtered(
            index, vectors, pairs, k, as_probabilities=fusion is not None
        )
