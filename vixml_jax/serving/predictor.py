"""Predictor: opens a trained run once and returns labels for new queries, from any thread."""

import dataclasses
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from vixml_jax import config as config_lib
from vixml_jax import saved_model
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import SearchConfig
from vixml_jax.data.store import Items, Ragged
from vixml_jax.errors import InputError
from vixml_jax.labels.head import query_params
from vixml_jax.modeling import Model
from vixml_jax.search import factory
from vixml_jax.search import fusion as fusion_lib
from vixml_jax.search import index as index_lib
from vixml_jax.search.fusion import Fusion, HeadRows
from vixml_jax.search.index import Index
from vixml_jax.search.prefix import Prefix
from vixml_jax.serving import label_updates, label_view, opening, query_items
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.serving.coalescing import Coalescer
from vixml_jax.serving.label_updates import LabelUpdates
from vixml_jax.serving.label_view import LabelView
from vixml_jax.serving.query_encoder import QueryEncoder
from vixml_jax.storage import object_store
from vixml_jax.structs import LabelState, Queries, SearchResult

K = 10  # Default number of labels per query.


class Prediction(NamedTuple):
    """A label found for a query.

    Attributes:
      id: Id in the source data.
      text: Text of the label.
      score: In a run with a label head, the probability that a label drawn from those of the query
        is this one, with training neighbours or without; scores of all labels add up to 1, so they
        are comparable between queries and between runs. In a run without a head, the cosine of the
        vectors of query and label; with training neighbours, a share of a softmax over the labels
        and training queries found (`augmentation.mixing`), comparable within a query only.
    """

    id: str
    text: str
    score: float


class _Call(NamedTuple):
    """What `Predictor.__call__` searches for; see there."""

    items: Items
    k: int
    never: Sequence[Sequence[str]] | None


class Predictor:
    """Returns the best labels of queries, by a run's model and labels. Create it with `load`.

    Each call sees the labels of one moment, those of `view`, whatever is refreshed meanwhile.

    Attributes:
      workdir: The run directory.
      artifacts: Serving artifacts of the run.
      view: The labels as `refresh` found them last: those of the run, with all label updates.
      model: The run's model.
      params: Its parameters, as `QueryEncoder` has them. Of the label head, only the network of the
        queries.
      labels: Its label state.
      head_rows: What is searched of the labels beside their prototypes; None: the run has no head.
      fusion: Weights of the parts of a label's score; None without a head.
      mixing: How training neighbours are mixed in; None: they are not used.
      image_width: Width of the image embeddings that the model reads; 0: it reads none.
      prefix: The columns of vectors that are searched.
      model_digest: Tells the model from others of the same data and step; empty: not known.
    """

    def __init__(
        self,
        workdir: str,
        model: Model,
        params: Any,
        labels: LabelState,
        artifacts: ServingArtifacts,
        *,
        index: Index,
        train_index: Index | None,
        scoring: Scoring,
        width: int = 0,
        head_rows: HeadRows | None = None,
        min_results: int = K,
        model_digest: str = "",
    ):
        """Combines the parts that `load` opens.

        Args:
          workdir, model, params, labels, artifacts, head_rows, model_digest: See the attributes.
          index: Over the vectors of the labels: their prototypes, fused with the head if there is
            one.
          train_index: Over the vectors of the training queries; needed for mixing.
          scoring: Weights of the scores; see the attributes `fusion` and `mixing`.
          width: Columns of vectors that the indexes search; 0: all.
          min_results: Labels that are retrieved per query at least, however few are returned.
        """
        self.workdir, self.artifacts, self.model_digest = workdir, artifacts, model_digest
        self.model, self.labels, self.head_rows = model, labels, head_rows
        self.fusion, self.mixing = scoring.fusion, scoring.mixing
        self._run_index, self._train_index = index, train_index
        self._min_results = min_results
        self.prefix = Prefix(model.table.width, width or model.table.width)
        self._encoder = QueryEncoder(model, params, artifacts)
        self.params = self._encoder.params
        self.image_width = self._encoder.image_width
        self._calls = Coalescer(self._run_calls, self._encoder.planner.max_size)
        self._refreshing = threading.Lock()
        self.refresh()

    @staticmethod
    def load(
        workdir: str,
        *,
        search: str = "auto",
        search_config: SearchConfig = config_lib.SEARCH,
        values: flags.FlagValues | None = None,
        data: str = "",
        data_cache: str = object_store.CACHE,
        mesh: str = "",
        with_neighbours: bool = True,
        warm: bool = True,
    ) -> "Predictor":
        """Opens a run; writes its serving artifacts first if they are missing or of another step.

        Args:
          workdir: Run directory that `train` wrote.
          search: 'exact', 'scann' or 'auto', with the meaning of the flag `predict --search`.
          search_config: Settings of the search.
          values: Parsed flags of `augmentation.settings.define_flags`; None: scores as tuned or as
            trained.
          data: Prepared data of the run, if they have moved; needed only to write serving
            artifacts.
          data_cache: Local directory for data that are copied from an object store.
          mesh: Another mesh than in training; empty: the same.
          with_neighbours: Off: training neighbours are not used, whatever was tuned or trained.
          warm: Whether to compile all programs now, instead of at the first queries.

        Raises:
          InputError: If there is no such run, `data` are not those that it was trained on, or
            serving artifacts cannot be written.
        """
        object_store.check(workdir, "workdir")
        if not object_store.is_local(workdir):
            raise InputError(
                f"--workdir={workdir}: expected a local directory, since serving artifacts and "
                "indexes are written to it; copy the run to this machine first"
            )
        config = workdir_lib.read_config(workdir, data=data, mesh=mesh)
        factory.check(search, search_config, config, workdir_lib.read_tower(workdir)[0].width)
        if data:  # Others are refused, even if nothing has to be read from them.
            workdir_lib.open_run_dataset(config, data_cache)
        with saved_model.opened(workdir) as saved:
            model_digest = saved.digest
            if values is None:
                scoring = settings_lib.as_tuned(config, workdir, saved.step)
            else:
                scoring = settings_lib.from_flags(config, values, workdir, saved.step)
            if not with_neighbours:
                scoring = scoring.without_neighbours()
            # New labels of a run with a head are compared with its training queries.
            needs_train = scoring.mixing is not None or config.head.enabled
            model, params, labels, artifacts = opening.open_run(
                config, saved, needs_train, data_cache
            )
        searched, head_rows = artifacts.vectors, None
        if "head" in params:
            vectors, bias = (shard.values for shard in model.head_rows(params))
            head_rows = HeadRows(vectors, bias, fusion_lib.log_counts(artifacts.train_relevance))
            searched = fusion_lib.LabelRows(searched, head_rows)
            # The rows are on the host and in the index.
            params = {**params, "head": query_params(params["head"])}
        else:
            scoring = scoring._replace(fusion=None)

        def open_named(vectors: Any, name: str, k: int, weights: Sequence[float] = ()) -> Index:
            return factory.open_index(
                vectors,
                kind=search,
                embedding=model.table.width,
                directory=os.path.join(workdir, "evaluation", "scann", name),
                weights=weights,
                k=min(k, len(vectors)),
                mesh=model.mesh,
                **dataclasses.asdict(search_config),
            )

        weights, train_index = scoring.fusion or (), None
        index = open_named(searched, "labels", config.eval.k, weights)
        if scoring.mixing is not None:
            train_index = open_named(artifacts.train_vectors, "training_queries", scoring.mixing.k)
        predictor = Predictor(
            workdir,
            model,
            params,
            labels,
            artifacts,
            index=index,
            train_index=train_index,
            scoring=scoring,
            width=search_config.width,
            head_rows=head_rows,
            min_results=K if scoring.mixing is None else config.eval.k,
            model_digest=model_digest,
        )
        if warm:
            predictor.warm_up()
        return predictor

    def refresh(self) -> None:
        """Reads label updates that were written since the run was opened.

        Calls in progress end with the labels that they began with. Several threads may refresh.

        Raises:
          InputError: If an update is damaged, or was made for another model; the labels stay as
            they were.
        """
        with self._refreshing:  # So that what was read last is what is seen last.
            self.view = label_view.make(
                self.artifacts,
                self.head_rows,
                self._run_index,
                label_updates.read(self.workdir, self.artifacts, self.label_width),
                lambda rows: factory.exact_index(rows, self.prefix, self.model.mesh),
            )

    @property
    def updates(self) -> LabelUpdates:
        """Labels added to and removed from the run since training."""
        return self.view.updates

    @property
    def num_labels(self) -> int:
        """Number of labels that can be found."""
        return self.view.num_labels

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        k: int = K,
        min_score: float = -np.inf,
        never: Sequence[Sequence[str]] | None = None,
        timeout: float | None = None,
    ) -> list[list[Prediction]]:
        """Returns the best labels of each query, best first; none for a query without content.

        Calls that several threads make at the same time run together (`serving.coalescing`), which
        takes less time than one after the other. The last digits of a score depend on what a query
        runs together with, as sums are rounded in another order.

        Args:
          texts: Texts of the queries.
          images: For each query the embedding of its image [v], of several images [j, v], or None.
          k: Maximum number of labels per query.
          min_score: Labels with a lower score are left out.
          never: For each query, ids of labels that must not be predicted.
          timeout: Seconds to wait for the calls of other threads; None: any time.

        Raises:
          InputError: If texts or images are malformed, or an id of `never` is unknown.
          TimeoutError: If there is no result within `timeout`.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1")
        if np.isnan(min_score):
            raise InputError("min_score=nan: expected a number")
        call = _Call(self.items(texts, images), k, never)
        # How many labels are retrieved changes scores, so it is the same in all calls of a batch.
        view, found = self._calls(
            call, size=len(texts), kind=max(k, self._min_results), timeout=timeout
        )
        empty = np.array([not text.strip() for text in texts], bool)
        if call.items.images is not None:
            empty &= np.diff(call.items.images.offsets) == 0
        found.ids[empty] = -1
        return [
            [
                Prediction(*view.label(row), float(score))
                for row, score in zip(ids, scores, strict=True)
                if row >= 0 and score >= min_score
            ]
            for ids, scores in zip(found.ids, found.scores, strict=True)
        ]

    def _run_calls(
        self, calls: Sequence[_Call]
    ) -> list[tuple[LabelView, SearchResult] | InputError]:
        """Returns for each call the labels that it saw and those that it found, or its error."""
        view = self.view
        pairs: list[Int[np.ndarray, "f 2"] | InputError] = []
        for call in calls:
            try:
                pairs.append(view.filter_pairs(call.never, len(call.items)))
            except InputError as error:
                pairs.append(error)
        valid = [i for i, found in enumerate(pairs) if not isinstance(found, InputError)]
        if not valid:
            return pairs
        starts = np.cumsum([0, *(len(calls[i].items) for i in valid)])
        shifted = [pairs[i] + [start, 0] for i, start in zip(valid, starts[:-1], strict=True)]
        found = self.search(
            self._encoder.queries(query_items.joined([calls[i].items for i in valid])),
            min(max(calls[i].k for i in valid), view.num_labels),
            np.concatenate(shifted),
            view=view,
        )
        results: list[Any] = [*pairs]
        for i, start, end in zip(valid, starts[:-1], starts[1:], strict=True):
            results[i] = view, SearchResult(*(x[start:end, : calls[i].k] for x in found))
        return results

    @property
    def label_width(self) -> int:
        """Width of the vectors that represent labels in the search."""
        return label_view.label_width(self.artifacts, self.head_rows)

    def label_vectors(self, rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m w"]:
        """Returns the vectors of labels whose inner products with `query_vectors` are scores.

        Args:
          rows: Of the labels; those of added labels follow those of the run.
        """
        return self.view.label_vectors(rows)

    def query_vectors(self, queries: Queries) -> Float[np.ndarray, "q w"]:
        """Returns what is searched with: unit vectors of queries, fused with those of the head."""
        if self.fusion is None:
            return queries.vectors
        return fusion_lib.query_vectors(*queries, self.fusion)

    def head_queries(
        self, vectors: Float[np.ndarray, "q e"], tokens: Ragged
    ) -> Float[np.ndarray, "q e"]:
        """Returns the vectors with which the label head scores queries.

        Args:
          vectors: Unit vectors of the queries.
          tokens: Their tokens.
        """
        return self._encoder.head_queries(vectors, tokens)

    def head_log_sum(self, head_queries: Float[np.ndarray, "q e"]) -> Float[np.ndarray, " q"]:
        """Returns the log of the sum of exp(logit) over the run's labels, by the head alone."""
        fused = fusion_lib.query_vectors(0 * head_queries, head_queries, Fusion(0.0, 1.0))
        return self._run_index.search_normalised(fused, 1).log_sum

    @functools.cached_property
    def train_index(self) -> Index | None:
        """Over the vectors of the training queries; None: the run keeps none."""
        if self._train_index is not None or self.artifacts.train_vectors is None:
            return self._train_index
        return factory.exact_index(self.artifacts.train_vectors, self.prefix, self.model.mesh)

    def label(self, row: int) -> tuple[str, str]:
        """Returns id and text of a label; rows of added labels follow those of the run."""
        return self.view.label(row)

    def row_of(self, name: str) -> int | None:
        """Returns the row of a label by its id; None if there is no such label."""
        return self.view.row_of(name)

    def search(
        self,
        queries: Queries,
        k: int,
        pairs: Int[np.ndarray, "f 2"] | None = None,
        *,
        view: LabelView | None = None,
    ) -> SearchResult:
        """Returns the k best labels of queries, with scores as in `Prediction`.

        Labels that were added are found, labels that were removed are not.

        At least as many labels are retrieved as in evaluation, however small k is, because the
        scores with training neighbours depend on their number (a label that only neighbours brought
        lacks its own part), and so do the compiled programs.

        Args:
          queries: From `queries`.
          k: Columns of the result; rows are shorter where there are fewer labels.
          pairs: (query, label) that must not be found.
          view: The labels, whose rows are found; None: those of now.
        """
        view = view or self.view
        result = index_lib.empty_result(len(queries.vectors), k)
        retrieved = min(max(k, self._min_results), view.num_labels)
        for rows in self._encoder.planner.batches(len(queries.vectors)):
            block = queries.at(rows)
            block_pairs = np.zeros((0, 2), np.int64)
            if pairs is not None:
                block_pairs = index_lib.pairs_of(pairs, np.arange(rows.start, rows.stop))
            has_head = self.fusion is not None
            found = index_lib.search_filtered(
                view.index,
                self.query_vectors(block),
                block_pairs,
                retrieved,
                as_probabilities=has_head,
            )
            if self.mixing is not None:
                num_near = min(max(self.mixing.k, retrieved), view.relevance.shape[0])
                near = self._train_index.search(block.vectors, num_near)
                found = mixing_lib.mix_neighbours(
                    found,
                    near,
                    view.relevance,
                    self.mixing,
                    k,
                    block_pairs,
                    as_probabilities=has_head,
                )
            found = SearchResult(*(x[:, :k] for x in found))
            result.scores[rows], result.ids[rows] = index_lib.pad_columns(found, k)
        return result

    def nearest_labels(self, vectors: Float[np.ndarray, "q e"], k: int) -> Int[np.ndarray, "q k"]:
        """Returns the rows of the k labels of the run whose prototypes are nearest.

        Label updates have no effect.
        """
        if self.head_rows is not None:
            vectors = fusion_lib.query_vectors(vectors, np.zeros_like(vectors), Fusion(1.0, 0.0))
        return self._run_index.search(vectors, min(k, len(self.artifacts.ids))).ids

    def free_and_centroids(
        self, rows: Int[np.ndarray, "m k"]
    ) -> tuple[Float[np.ndarray, "m k e"], Float[np.ndarray, "m k e"]]:
        """Returns free vectors (zero in a run without) and centroids of labels of the run."""
        centroids = np.array(self.labels.centroids[rows])
        if "free" not in self.params:
            return np.zeros_like(centroids), centroids
        clusters = np.asarray(self.labels.cluster_of[rows])
        return np.asarray(self.params["free"][clusters]), centroids

    def prototypes(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None,
        free: Float[np.ndarray, "m e"],
        centroids: Float[np.ndarray, "m e"],
    ) -> Float[np.ndarray, "m e"]:
        """Returns unit prototypes of new labels, from their content and the combiner's inputs."""
        return self._encoder.prototypes(self.items(texts, images), free, centroids)

    def encode(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "q e"]:
        """Returns unit vectors of queries, using the programs that `warm_up` compiles."""
        return self._encoder.encode(self.items(texts, images))

    def queries(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Queries:
        """Returns encoded queries, as `search` takes them."""
        return self._encoder.queries(self.items(texts, images))

    def items(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Returns texts and images in the form of prepared data.

        Raises:
          InputError: If texts or images are malformed.
        """
        return self._encoder.items(texts, images)

    def has_only_unknown_tokens(self, items: Items) -> list[bool]:
        """Whether the text of each item has tokens, none of which the tokenizer knows."""
        return self._encoder.has_only_unknown_tokens(items)

    def warm_up(self) -> None:
        """Compiles the programs for any number of queries, so that none waits."""

        def search(queries: Queries) -> None:
            count = len(queries.vectors)
            for pairs in (None, np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)):
                self.search(queries, K, pairs)

        self._encoder.warm_up(search)
