"""Predictor: opens a trained run once and returns labels for new queries, from any thread."""

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from vixml_jax import config as config_lib
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import neighbours
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.config import SearchConfig
from vixml_jax.data.store import Items, PreparedDataset, Ragged, Texts
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import console
from vixml_jax.search import index as index_lib
from vixml_jax.search import updates as updates_lib
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.factory import open_index
from vixml_jax.search.index import Index
from vixml_jax.serving import artifacts as artifacts_lib
from vixml_jax.serving import batching, label_updates
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.storage import object_store
from vixml_jax.structs import LabelState, PackedItems, SearchResult

K = 10  # Default number of labels per query.
MAX_CHARACTERS = 1 << 16  # Longer texts are cut; the tokens that are read end long before.


class Prediction(NamedTuple):
    """A label found for a query."""

    id: str  # Id in the source data.
    text: str
    score: float  # Cosine similarity; with training neighbours, a probability.


class Predictor:
    """Returns the best labels of queries, by a run's model and labels. Create it with `load`.

    Attributes:
      workdir: The run directory.
      artifacts: Serving artifacts of the run.
      updates: Labels added to and removed from the run since training.
      model: The run's model.
      params: Its parameters.
      labels: Its label state.
      mixing: How training neighbours are mixed in; None: they are not used.
      image_width: Width of the image embeddings that the model reads; 0: it reads none.
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
        mixing: Mixing | None,
        min_results: int = K,
    ):
        """Combines the parts that `load` opens.

        Args:
          workdir, model, params, labels, artifacts, mixing: See the attributes.
          index: Over the label vectors of the artifacts.
          train_index: Over the vectors of the training queries; needed for mixing.
          min_results: Labels that are retrieved per query at least, however few are returned.
        """
        self.workdir, self.artifacts = workdir, artifacts
        self.model, self.params, self.labels, self.mixing = model, params, labels, mixing
        self._run_index, self._train_index = index, train_index
        self._min_results = min_results
        tower, about = model.tower.config, artifacts.about
        self.image_width = tower.image_width if model.layout.num_images else 0
        tokenizer = tokenizer_lib.load(artifacts.path, about.max_tokens)
        self._unknown_token = tokenizer.token_to_id("[UNK]")
        self._num_special = sum(map(len, tokenizer_lib.special_tokens(tokenizer)))
        self._encoder, self._encoder_lock = batch_tokenizer.Encoder(tokenizer), threading.Lock()
        self._planner = batching.BatchPlanner(
            num_shards=sharding.num_row_shards(model.mesh),
            row_width=model.row_width,
            layout=model.layout,
            mean_tokens=about.mean_tokens,
            max_tokens=about.max_tokens,
        )
        self._rows_by_id: dict[str, int] | None = None
        self.refresh()

    @staticmethod
    def load(
        workdir: str,
        *,
        search: str = "exact",
        search_config: SearchConfig = config_lib.SEARCH,
        values: flags.FlagValues | None = None,
        data: str = "",
        data_cache: str = object_store.CACHE,
        mesh: str = "",
        warm: bool = True,
    ) -> "Predictor":
        """Opens a run; writes its serving artifacts first if they are missing or of another step.

        Args:
          workdir: Run directory that `train` wrote.
          search: 'exact' or 'scann'; 'scann' uses the index that `evaluate --search=scann` tuned.
          search_config: Settings of the search.
          values: Parsed flags of `neighbours.define_flags`; None: neighbours as tuned or trained.
          data: Prepared data, if they have moved; needed only to write serving artifacts.
          data_cache: Local directory for data that are copied from an object store.
          mesh: Another mesh than in training; empty: the same.
          warm: Whether to compile all programs now, instead of at the first queries.

        Raises:
          InputError: If there is no such run, or serving artifacts cannot be written.
        """
        object_store.check(workdir, "workdir")
        if not object_store.is_local(workdir):
            raise InputError(
                f"--workdir={workdir}: expected a local directory, since serving artifacts and "
                "indexes are written to it; copy the run to this machine first"
            )
        config = workdir_lib.read_config(workdir, data=data, mesh=mesh)
        tower, layout = workdir_lib.read_tower(workdir)
        path = artifacts_lib.locate(workdir)
        _, step = workdir_lib.find_model(workdir)
        if values is None:
            mixing = neighbours.as_tuned(config.knn, workdir, step)
        else:
            mixing = neighbours.from_flags(config.knn, values, workdir, step)
        reusable = os.path.isdir(path) and _is_current(path, step, mixing)
        if reusable:
            num_labels = artifacts_lib.read_about(path).num_labels
        else:
            dataset = _open_data(config, path, data_cache)
            num_labels = dataset.num_labels
        model = workdir_lib.build_model(
            config, tower, layout, num_labels, workdir_lib.make_mesh(config)
        )
        params, labels, _ = workdir_lib.restore_model(workdir, model)
        if not reusable:
            path = os.path.join(workdir, artifacts_lib.DIRECTORY)
            console.status(f"{path}: encoding labels of {dataset.path}, model of step {step}")
            write_artifacts(path, model, params, labels, dataset, step, mixing, config.eval.block)
        artifacts = ServingArtifacts.open(path)

        def open_named(vectors: np.ndarray, name: str, k: int) -> Index:
            return open_index(
                vectors,
                kind=search,
                directory=os.path.join(workdir, "evaluation", "scann", name),
                k=min(k, len(vectors)),
                mesh=model.mesh,
                **dataclasses.asdict(search_config),
            )

        index = open_named(artifacts.vectors, "labels", config.eval.k)
        train_index = None
        if mixing is not None:
            train_index = open_named(artifacts.train_vectors, "training_queries", mixing.k)
        predictor = Predictor(
            workdir,
            model,
            params,
            labels,
            artifacts,
            index=index,
            train_index=train_index,
            mixing=mixing,
            min_results=K if mixing is None else config.eval.k,
        )
        if warm:
            predictor.warm_up()
        return predictor

    def refresh(self) -> None:
        """Reads label updates that were written since the run was opened."""
        updates = label_updates.read(self.workdir, self.artifacts)
        self.updates, self._index = updates, self._run_index
        if len(updates.ids) or len(updates.removed):
            added = ExactIndex(updates.vectors, mesh=self.model.mesh) if updates.ids else None
            self._index = updates_lib.UpdatedIndex(
                self._run_index, added, len(self.artifacts.ids), updates.removed
            )
        if self.mixing is not None:
            self._relevance = label_updates.apply_to_relevance(
                self.artifacts.train_relevance, updates
            )
        self._rows_by_id = None

    @property
    def num_labels(self) -> int:
        """Number of labels that can be found."""
        return len(self.artifacts.ids) + len(self.updates.ids) - len(self.updates.removed)

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        k: int = K,
        min_score: float = -np.inf,
        never: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Prediction]]:
        """Returns the best labels of each query, best first; none for a query without content.

        Args:
          texts: Texts of the queries.
          images: For each query the embedding of its image [v], of several images [j, v], or None.
          k: Maximum number of labels per query.
          min_score: Labels with a lower score are left out.
          never: For each query, ids of labels that must not be predicted.

        Raises:
          InputError: If texts or images are malformed, or an id of `never` is unknown.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1")
        items = self.items(texts, images)
        pairs = self._filter_pairs(never, len(texts))
        found = self.search(self._encode_items(items), k, pairs)
        empty = np.array([not text.strip() for text in texts], bool)
        if items.images is not None:
            empty &= np.diff(items.images.offsets) == 0
        found.ids[empty] = -1
        return [
            [
                Prediction(*self.label(row), float(score))
                for row, score in zip(ids, scores, strict=True)
                if row >= 0 and score >= min_score
            ]
            for ids, scores in zip(found.ids, found.scores, strict=True)
        ]

    def label(self, row: int) -> tuple[str, str]:
        """Returns id and text of a label; rows of added labels follow those of the run."""
        count = len(self.artifacts.ids)
        source, at = (self.artifacts, row) if row < count else (self.updates, row - count)
        return source.ids[at], source.texts[at]

    def row_of(self, name: str) -> int | None:
        """Returns the row of a label by its id; None if there is no such label."""
        if self._rows_by_id is None:
            ids = (name for chunk in self.artifacts.ids.chunks() for name in chunk)
            rows = {name: row for row, name in enumerate(ids)}
            first = len(rows)
            rows |= {name: first + i for i, name in enumerate(self.updates.ids)}
            removed = set(self.updates.removed.tolist())
            self._rows_by_id = {name: row for name, row in rows.items() if row not in removed}
        return self._rows_by_id.get(name)

    def search(
        self,
        vectors: Float[np.ndarray, "q e"],
        k: int,
        pairs: Int[np.ndarray, "f 2"] | None = None,
    ) -> SearchResult:
        """Returns the k best labels of unit query vectors, added labels included.

        At least as many labels are retrieved as in evaluation, however small k is, because the
        scores with training neighbours depend on their number, and so do the compiled programs.

        Args:
          vectors: Of the queries.
          k: Columns of the result; rows are shorter where there are fewer labels.
          pairs: (query, label) that must not be found.
        """
        result = index_lib.empty_result(len(vectors), k)
        retrieved = min(max(k, self._min_results), self.num_labels)
        for batch in self._planner.batches(len(vectors)):
            block = np.zeros((batch.size, vectors.shape[1]), np.float32)
            block[: batch.count] = vectors[batch.rows]
            block_pairs = np.zeros((0, 2), np.int64)
            if pairs is not None:
                rows = np.arange(batch.rows.start, batch.rows.stop)
                block_pairs = index_lib.pairs_of(pairs, rows)
            found = index_lib.search_filtered(self._index, block, block_pairs, retrieved)
            if self.mixing is not None:
                near = self._train_index.search(block, max(self.mixing.k, retrieved))
                found = mixing_lib.mix_neighbours(
                    found, near, self._relevance, self.mixing, k, block_pairs
                )
            found = SearchResult(*(x[: batch.count, :k] for x in found))
            found = index_lib.pad_columns(found, k)
            result.scores[batch.rows], result.ids[batch.rows] = found
        return result

    def nearest_labels(self, vectors: Float[np.ndarray, "q e"], k: int) -> Int[np.ndarray, "q k"]:
        """Returns the rows of the k nearest labels of the run, without label updates."""
        return self._run_index.search(vectors, min(k, len(self.artifacts.ids))).ids

    def free_and_centroids(
        self, rows: Int[np.ndarray, "m k"]
    ) -> tuple[Float[np.ndarray, "m k e"], Float[np.ndarray, "m k e"]]:
        """Returns free vectors and centroids of labels of the run."""
        clusters = np.asarray(self.labels.cluster_of[rows])
        return np.asarray(self.params["free"][clusters]), np.array(self.labels.centroids[rows])

    def prototypes(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None,
        free: Float[np.ndarray, "m e"],
        centroids: Float[np.ndarray, "m e"],
    ) -> Float[np.ndarray, "m e"]:
        """Returns unit prototypes of new labels, from their content and the combiner's inputs."""

        def run(packed: PackedItems, batch: batching.Batch) -> Any:
            padded = [np.zeros((batch.size, free.shape[1]), np.float32) for _ in range(2)]
            for array, values in zip(padded, (free, centroids), strict=True):
                array[: batch.count] = values[batch.rows]
            arguments = sharding.to_devices((packed, *padded), self.model.mesh)
            return self.model.new_prototypes(self.params, *arguments)

        return self._in_batches(run, self.items(texts, images))

    def encode(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "q e"]:
        """Returns unit vectors of queries, using the programs that `warm_up` compiles."""
        return self._encode_items(self.items(texts, images))

    def _encode_items(self, items: Items) -> Float[np.ndarray, "q e"]:
        def run(packed: PackedItems, batch: batching.Batch) -> Any:
            packed = sharding.to_devices(packed, self.model.mesh)
            return self.model.encode_packed(self.params, packed, batch.size)

        return self._in_batches(run, items)

    def _in_batches(
        self, run: Callable[[PackedItems, batching.Batch], Any], items: Items
    ) -> Float[np.ndarray, "q e"]:
        """Packs items in batches and concatenates the vectors that `run` returns for them."""
        vectors = np.empty((len(items), self.model.table.width), np.float32)
        for batch in self._planner.batches(len(items)):
            packed = self._planner.pack(items, batch)
            vectors[batch.rows] = np.asarray(run(packed, batch))[: batch.count]
        return vectors

    def items(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Returns texts and images in the form of prepared data.

        Raises:
          InputError: If texts or images are malformed.
        """
        if isinstance(texts, str):
            raise InputError(f"found one text, {texts[:40]!r}, expected a list of texts")
        checked = [_checked_text(text, query) for query, text in enumerate(texts)]
        with self._encoder_lock:
            tokens = self._encoder.encode(checked)
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        item_images = None
        if self.image_width:  # Queries without images use the same programs.
            images = [None] * len(texts) if images is None else images
            item_images = self._ragged_images(images, len(texts))
        no_texts = Texts(np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64))
        return Items(no_texts, Ragged(tokens.values, offsets), item_images)

    def has_only_unknown_tokens(self, items: Items) -> list[bool]:
        """Whether the text of each item has tokens, none of which the tokenizer knows."""
        values, offsets = items.tokens
        return [
            b - a > self._num_special
            and self._unknown_token is not None
            and np.count_nonzero(values[a:b] != self._unknown_token) == self._num_special
            for a, b in itertools.pairwise(offsets)
        ]

    def warm_up(self, k: int = K, max_queries: int = batching.SIZES[-1]) -> None:
        """Compiles the programs for calls of up to `max_queries` queries, so that none waits."""
        image = np.zeros((self.model.layout.num_images, self.image_width))
        images = [image] if self.image_width else None
        layout, planner = self.model.layout, self._planner
        beside_words = layout.overhead + self._num_special - sum(layout.trim)
        max_size = planner.size_for(max_queries)
        for size in (size for size in planner.sizes if size <= max_size):
            for words in (1, *(width - beside_words for width in planner.widths)):
                vectors = self.encode(["a " * max(1, words)] * size)
            for pairs in (None, np.zeros((1, 2), np.int64)):
                self.search(vectors, k, pairs)
            longest = "a " * self.artifacts.about.max_tokens
            self.encode([longest] * size, images and images * size)

    def _ragged_images(self, images: Sequence[Any], count: int) -> Ragged:
        """Returns image embeddings of queries, checked, in float16."""
        if len(images) != count:
            raise InputError(f"found images for {len(images)} queries, expected {count}")
        rows = [np.zeros((0, self.image_width), np.float16)]
        for query, image in enumerate(images):
            values = np.zeros((0, self.image_width)) if image is None else np.asarray(image)
            values = values.reshape(-1, values.shape[-1]) if values.ndim else values
            if values.ndim != 2 or values.shape[1] != self.image_width:
                raise InputError(
                    f"query {query}: found an image of shape {np.shape(image)}, expected "
                    f"embeddings of width {self.image_width}"
                )
            with np.errstate(over="ignore"):
                rows.append(values.astype(np.float16))
            if not np.isfinite(rows[-1]).all():
                raise InputError(f"query {query}: an image embedding is not finite in float16")
        offsets = np.cumsum([len(row) for row in rows])
        return Ragged(np.concatenate(rows), offsets)

    def _filter_pairs(
        self, never: Sequence[Sequence[str]] | None, count: int
    ) -> Int[np.ndarray, "f 2"] | None:
        """Returns (query, label) pairs of the labels that must not be predicted."""
        if never is None or not any(never):
            return None
        if len(never) != count:
            raise InputError(f"found filters for {len(never)} queries, expected {count}")
        pairs = []
        for query, names in enumerate(never):
            for name in names:
                row = self.row_of(name)
                if row is None:
                    raise InputError(f"query {query}: unknown label {name!r} in its filter")
                pairs.append((query, row))
        return np.array(pairs)


def _checked_text(text: Any, query: int) -> str:
    """Returns the beginning of a text, after checking that it can be encoded."""
    if not isinstance(text, str):
        raise InputError(f"query {query}: found {type(text).__name__}, expected a text")
    text = text[:MAX_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"query {query}: the text contains a lone surrogate") from None
    return text


def _is_current(path: str, step: int, mixing: Mixing | None) -> bool:
    """Whether artifacts are of this step, and have training vectors if they are needed."""
    about = artifacts_lib.read_about(path)
    if about.step != step:
        console.status(f"{path}: of step {about.step}; written again for the model of step {step}")
        return False
    return mixing is None or about.has_train_vectors


def _open_data(config: config_lib.Config, path: str, cache: str) -> PreparedDataset:
    """Opens the prepared data of a run, to write its artifacts."""
    try:
        dataset = workdir_lib.open_dataset(config, cache)
    except InputError as error:
        raise InputError(
            f"{path}: missing for this model, and cannot be written without the prepared data "
            f"({error}); name their directory by --data"
        ) from None
    recorded = workdir_lib.content_hash(config.workdir)
    if dataset.content_hash != recorded:
        raise InputError(
            f"--data={config.data}: not the data that the run was trained on; expected content "
            f"hash {recorded[:12]}..., found {dataset.content_hash[:12]}..."
        )
    return dataset


def write_artifacts(
    path: str,
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    step: int,
    mixing: Mixing | None,
    block: int,
) -> None:
    """Encodes the labels and, with training neighbours, the training queries; saves the vectors."""
    vectors = model.encode_labels(params, labels, dataset.labels, block=block, title="labels")
    vectors = distributed.gather_rows(vectors, dataset.num_labels, distributed.ALONE)
    train = None
    if mixing is not None:
        train = model.encode_queries(params, dataset.train, block=block, title="training queries")
        train = distributed.gather_rows(train, len(dataset.train), distributed.ALONE)
    artifacts_lib.save(path, dataset, step, vectors, train)
