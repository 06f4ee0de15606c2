"""Labels for new queries: a trained run, opened once, that answers from any number of threads."""

import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from vixml_jax import config as config_lib
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import neighbors
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.config import SearchConfig
from vixml_jax.data import packing
from vixml_jax.data.store import Items, PreparedDataset, Ragged, Texts
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed, sharding
from vixml_jax.search import index as index_lib
from vixml_jax.search import updates
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.factory import open_index
from vixml_jax.search.index import Index
from vixml_jax.serving import artifacts as answers_lib
from vixml_jax.serving import label_updates as changes_lib
from vixml_jax.serving.artifacts import Answers
from vixml_jax.storage import object_store
from vixml_jax.structs import LabelState, SearchResult

SIZES = (1, 8, 64, 256)  # Items that go through the tower together; one program each or two.
K = 10  # Labels a query, if not told.
MOST_CHARACTERS = 1 << 16  # Of a text: what is behind is far beyond the tokens that are read.


class Prediction(NamedTuple):
    """A label found for a query."""

    id: str  # What the source calls it.
    text: str
    score: float  # Cosine; with memory, a share of one.


class Predictor:
    """Answers queries by a run's model and labels. Use `load`.

    Attributes:
      workdir: Of the run.
      answers: Its labels.
      changes: Labels added since, and removed.
      model, params, labels: Its model.
      mixing: How training queries count; None: they do not.
      image_width: Of the embeddings of pictures that the model reads; 0: it reads none.
    """

    def __init__(
        self,
        workdir: str,
        model: Model,
        params: Any,
        labels: LabelState,
        answers: Answers,
        *,
        index: Index,
        memory: Index | None,
        mixing: Mixing | None,
        kept: int = K,
    ):
        self.workdir, self.answers = workdir, answers
        self._kept = kept  # Labels that are found of each query at least.
        self.model, self.params, self.labels, self.mixing = model, params, labels, mixing
        tower = model.tower.config
        self.image_width = tower.image_width if model.layout.num_images else 0
        self._own, self._memory = index, memory
        tokenizer = tokenizer_lib.load(answers.path, answers.about["max_tokens"])
        self._unknown = tokenizer.token_to_id("[UNK]")
        self._frame = sum(map(len, tokenizer_lib.special_tokens(tokenizer)))
        self._encoder, self._encoding = batch_tokenizer.Encoder(tokenizer), threading.Lock()
        shards = sharding.num_row_shards(model.mesh)
        self._sizes = sorted({-(-size // shards) * shards for size in SIZES})
        self._shards = shards
        overhead, mean = model.layout.overhead, answers.about["mean_tokens"]
        longest = min(model.row_width, answers.about["max_tokens"] + overhead)
        # Positions of texts as long as the mean, of most, and of the longest.
        self._widths = [min(longest, round(share * mean) + overhead) for share in (1, 1.5)]
        self._widths.append(longest)
        self._row_of: dict[str, int] | None = None
        self.refresh()

    @staticmethod
    def load(
        workdir: str,
        *,
        search: str = "exact",
        searched: SearchConfig = config_lib.SEARCH,
        values: flags.FlagValues | None = None,
        data: str = "",
        data_cache: str = object_store.CACHE,
        mesh: str = "",
        warm: bool = True,
    ) -> "Predictor":
        """Opens a run; what it answers from is made first where it is missing or of another step.

        Args:
          workdir: That `train` wrote.
          search: 'exact' or 'scann'; then by the index that `evaluate --search=scann` has tuned.
          searched: How, in detail.
          values: With the flags of `retrieval.define_flags`; None: as tuned or trained.
          data: Prepared data, if they have moved; needed only where answers must be made.
          data_cache: Where data from a store of objects are copied to.
          mesh: If not as trained.
          warm: Whether to compile now what queries need, rather than at the first ones.

        Raises:
          InputError: If there is no such run, or answers cannot be made.
        """
        object_store.check(workdir, "workdir")
        if not object_store.is_local(workdir):
            raise InputError(
                f"--workdir={workdir}: labels and indexes are kept beside the run; copy it to this "
                "machine first"
            )
        config = workdir_lib.read_config(workdir, data=data, mesh=mesh)
        tower, layout = workdir_lib.read_tower(workdir)
        path = os.path.join(workdir, answers_lib.DIRECTORY)
        _, step = workdir_lib.find_model(workdir)
        if values is None:
            mixing = neighbors.as_tuned(config.eval, workdir, step)
        else:
            mixing = neighbors.as_told(config.eval, values, workdir, step)
        fits = os.path.isdir(path) and _fits(path, step, mixing)
        if fits:
            num_labels = answers_lib.read_about(path)["num_labels"]
        else:
            dataset = _open_data(config, path, data_cache)
            num_labels = dataset.num_labels
        model = workdir_lib.build_model(
            config, tower, layout, num_labels, workdir_lib.make_mesh(config)
        )
        params, labels, _ = workdir_lib.restore_model(workdir, model)
        if not fits:
            print(f"{path}: labels of {dataset.path} are encoded for step {step}")
            make_answers(path, model, params, labels, dataset, step, mixing, config.eval.block)
        answers = Answers.open(path)

        def opened(vectors: np.ndarray, name: str, k: int) -> Index:
            return open_index(
                vectors,
                kind=search,
                directory=os.path.join(workdir, "evaluation", "scann", name),
                k=min(k, len(vectors)),
                mesh=model.mesh,
                **dataclasses.asdict(searched),
            )

        index = opened(answers.vectors, "labels", config.eval.k)
        memory = None if mixing is None else opened(answers.memory, "memory", mixing.k)
        predictor = Predictor(
            workdir,
            model,
            params,
            labels,
            answers,
            index=index,
            memory=memory,
            mixing=mixing,
            kept=K if mixing is None else config.eval.k,
        )
        if warm:
            predictor.warm_up()
        return predictor

    def refresh(self) -> None:
        """Takes up labels that were added or removed since."""
        changes = changes_lib.read(self.workdir, self.answers)
        self.changes, self._labels = changes, self._own
        if len(changes.ids) or len(changes.removed):
            added = ExactIndex(changes.vectors, mesh=self.model.mesh) if changes.ids else None
            self._labels = updates.ChangedIndex(
                self._own, added, len(self.answers.ids), changes.removed
            )
        if self.mixing is not None:
            self._relevance = changes_lib.remembered(self.answers.relevance, changes)
        self._row_of = None

    @property
    def num_labels(self) -> int:
        """Labels that can be found."""
        changes = self.changes
        return len(self.answers.ids) + len(changes.ids) - len(changes.removed)

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        k: int = K,
        min_score: float = -np.inf,
        never: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Prediction]]:
        """The best labels of each query, best first; none of a query without text and picture.

        Args:
          texts: Of the queries.
          images: Of each query, the embedding of its picture [v], of several [j, v], or None.
          k: Labels a query at most.
          min_score: Labels below are left out.
          never: Ids of labels that are not to be predicted, of each query.

        Raises:
          InputError: If texts are none, pictures not such as the model reads, labels unknown.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1")
        items = self.items(texts, images)
        pairs = self._pairs(never, len(texts))
        found = self.search(self._encode_items(items), k, pairs)
        nothing = np.array([not text.strip() for text in texts], bool)
        if items.images is not None:
            nothing &= np.diff(items.images.offsets) == 0
        found.ids[nothing] = -1
        return [
            [
                Prediction(*self.label(row), float(score))
                for row, score in zip(ids, scores, strict=True)
                if row >= 0 and score >= min_score
            ]
            for ids, scores in zip(found.ids, found.scores, strict=True)
        ]

    def label(self, row: int) -> tuple[str, str]:
        """Id and text of a label; those that were added follow the run's own."""
        own = len(self.answers.ids)
        source, at = (self.answers, row) if row < own else (self.changes, row - own)
        return source.ids[at], source.texts[at]

    def row_of(self, name: str) -> int | None:
        """The row of a label by its id; None: there is none."""
        if self._row_of is None:
            own = (name for chunk in self.answers.ids.chunks() for name in chunk)
            rows = {name: row for row, name in enumerate(own)}
            first = len(rows)
            rows |= {name: first + i for i, name in enumerate(self.changes.ids)}
            gone = set(self.changes.removed.tolist())
            self._row_of = {name: row for name, row in rows.items() if row not in gone}
        return self._row_of.get(name)

    def search(
        self,
        vectors: Float[np.ndarray, "q e"],
        k: int,
        pairs: Int[np.ndarray, "f 2"] | None = None,
    ) -> SearchResult:
        """The k best labels of unit query vectors, those that were added too.

        At least as many are looked at as evaluation keeps, however few are wanted: what memory adds
        to them hangs on their number, and so do the programs that are compiled.

        Args:
          vectors: Of the queries.
          k: Columns; rows are short where there are fewer labels.
          pairs: (query, label) never to be found.
        """
        result = index_lib.nothing(len(vectors), k)
        kept = min(max(k, self._kept), self.num_labels)
        for part, size in self._blocks(len(vectors)):
            count = part.stop - part.start
            block = np.zeros((size, vectors.shape[1]), np.float32)
            block[:count] = vectors[part]
            theirs = np.zeros((0, 2), np.int64)
            if pairs is not None:
                theirs = index_lib.pairs_of(pairs, np.arange(part.start, part.stop))
            found = index_lib.search_filtered(self._labels, block, theirs, kept)
            if self.mixing is not None:
                near = self._memory.search(block, max(self.mixing.k, kept))
                found = mixing_lib.mix_in_memory(
                    found, near, self._relevance, self.mixing, k, theirs
                )
            found = index_lib.pad_columns(SearchResult(*(x[:count, :k] for x in found)), k)
            result.scores[part], result.ids[part] = found
        return result

    def nearest_labels(self, vectors: Float[np.ndarray, "q e"], k: int) -> Int[np.ndarray, "q k"]:
        """Rows of the labels of the run itself that are nearest; k at most."""
        return self._own.search(vectors, min(k, len(self.answers.ids))).ids

    def known_of(
        self, rows: Int[np.ndarray, "m k"]
    ) -> tuple[Float[np.ndarray, "m k e"], Float[np.ndarray, "m k e"]]:
        """Free vectors and centroids of labels of the run itself."""
        clusters = np.asarray(self.labels.cluster_of[rows])
        return np.asarray(self.params["free"][clusters]), np.array(self.labels.centroids[rows])

    def prototypes(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None,
        free: Float[np.ndarray, "m e"],
        centroids: Float[np.ndarray, "m e"],
    ) -> Float[np.ndarray, "m e"]:
        """Unit prototypes of labels that the run does not have."""

        def run(packed: Any, size: int, part: slice) -> Any:
            known = [np.zeros((size, free.shape[1]), np.float32) for _ in range(2)]
            for to, values in zip(known, (free[part], centroids[part]), strict=True):
                to[: len(values)] = values
            placed = sharding.to_devices((packed, *known), self.model.mesh)
            return self.model.new_prototypes(self.params, *placed)

        return self._in_blocks(run, self.items(texts, images))

    def encode(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "q e"]:
        """Unit vectors of queries, by the programs that `warm_up` compiles."""
        return self._encode_items(self.items(texts, images))

    def _encode_items(self, items: Items) -> Float[np.ndarray, "q e"]:
        def run(packed: Any, size: int, part: slice) -> Any:
            placed = sharding.to_devices(packed, self.model.mesh)
            return self.model.encode_packed(self.params, placed, size)

        return self._in_blocks(run, items)

    def _in_blocks(
        self, run: Callable[[Any, int, slice], Any], items: Items
    ) -> Float[np.ndarray, "q e"]:
        """What `run` makes of packed items, of which sizes and rows are few."""
        found = np.empty((len(items), self.model.table.width), np.float32)
        for part, size in self._blocks(len(items)):
            ids = np.full(size, -1)
            ids[: part.stop - part.start] = np.arange(part.start, part.stop)
            found[part] = np.asarray(run(self._pack(items, ids), size, part))[
                : part.stop - part.start
            ]
        return found

    def _blocks(self, count: int) -> Iterator[tuple[slice, int]]:
        """Parts of so many items, and the number that each is filled up to: one of few."""
        for start in range(0, count, self._sizes[-1]):
            part = slice(start, min(start + self._sizes[-1], count))
            yield part, next(size for size in self._sizes if size >= part.stop - start)

    def items(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Texts and pictures as prepared data hold them."""
        if isinstance(texts, str):
            raise InputError(f"found one text, {texts[:40]!r}, expected a list of them")
        read = [_cut(text, query) for query, text in enumerate(texts)]
        with self._encoding:
            tokens = self._encoder.encode(read)
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        pictures = None
        if self.image_width:  # Absent pictures take the same program.
            pictures = self._pictures([None] * len(texts) if images is None else images, len(texts))
        return Items(Texts(np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)),
                     Ragged(tokens.values, offsets), pictures)  # fmt: skip

    def unknown(self, items: Items) -> list[bool]:
        """Whether a text has words, and none that the tokenizer knows."""
        values, offsets = items.tokens
        return [
            b - a > self._frame
            and self._unknown is not None
            and np.count_nonzero(values[a:b] != self._unknown) == self._frame
            for a, b in itertools.pairwise(offsets)
        ]

    def warm_up(self, k: int = K, most: int = SIZES[-1]) -> None:
        """Compiles what queries need, up to so many (`most`) at once, so that none waits for it."""
        picture = np.zeros((self.model.layout.num_images, self.image_width))
        images = [picture] if self.image_width else None
        beside = self.model.layout.overhead + self._frame - sum(self.model.layout.trim)
        enough = next((size for size in self._sizes if size >= most), self._sizes[-1])
        for size in (size for size in self._sizes if size <= enough):
            for words in (1, *(width - beside for width in self._widths)):
                vectors = self.encode(["a " * max(1, words)] * size)
            for pairs in (None, np.zeros((1, 2), np.int64)):
                self.search(vectors, k, pairs)
            self.encode(["a " * self.answers.about["max_tokens"]] * size, images and images * size)

    def _pack(self, items: Items, ids: Int[np.ndarray, " b"]) -> Any:
        """Rows enough for items as long as the mean, with room for chance and for the ends of rows,
        else for the longest: two shapes a size. An item that a device reads alone has a row that is
        hardly wider than it."""
        each = len(ids) // self._shards
        width, layout = self.model.row_width, self.model.layout
        mean, *_, longest = self._widths
        if each == 1:
            tokens = np.diff(items.tokens.offsets).max(initial=0) - sum(layout.trim)
            width = next((w for w in self._widths if tokens + layout.overhead <= w), longest)
            return packing.pack(items, ids, width=width, layout=layout, blocks=self._shards)
        most = -(-each // (width // longest))
        few = min(most, max(1, math.ceil(each * mean * (1.1 + each**-0.5) / width)))
        return packing.pack(
            items,
            ids,
            width=width,
            layout=layout,
            blocks=self._shards,
            rows=packing.RowSizes(few, max(1, most - few)),
        )

    def _pictures(self, images: Sequence[Any], count: int) -> Ragged:
        if len(images) != count:
            raise InputError(f"found pictures of {len(images)} queries, expected of {count}")
        rows = [np.zeros((0, self.image_width), np.float16)]
        for query, found in enumerate(images):
            found = np.zeros((0, self.image_width)) if found is None else np.asarray(found)
            found = found.reshape(-1, found.shape[-1]) if found.ndim else found
            if found.ndim != 2 or found.shape[1] != self.image_width:
                raise InputError(
                    f"query {query}: found a picture of shape {np.shape(images[query])}, expected "
                    f"embeddings {self.image_width} wide"
                )
            with np.errstate(over="ignore"):
                rows.append(found.astype(np.float16))
            if not np.isfinite(rows[-1]).all():
                raise InputError(f"query {query}: a picture's embedding is not finite in float16")
        offsets = np.cumsum([len(row) for row in rows])
        return Ragged(np.concatenate(rows), offsets)

    def _pairs(
        self, never: Sequence[Sequence[str]] | None, count: int
    ) -> Int[np.ndarray, "f 2"] | None:
        if never is None or not any(never):
            return None
        if len(never) != count:
            raise InputError(f"found filters of {len(never)} queries, expected of {count}")
        found = []
        for query, names in enumerate(never):
            for name in names:
                row = self.row_of(name)
                if row is None:
                    raise InputError(f"query {query}: label {name!r} is not among the labels")
                found.append((query, row))
        return np.array(found)


def _cut(text: Any, query: int) -> str:
    """What is read of a text."""
    if not isinstance(text, str):
        raise InputError(f"query {query}: found {type(text).__name__}, expected text")
    text = text[:MOST_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"query {query}: holds half a character (a lone surrogate)") from None
    return text


def _fits(path: str, step: int, mixing: Mixing | None) -> bool:
    """Whether answers are of this step, and have the memory that is wanted; says if not."""
    about = answers_lib.read_about(path)
    if about["step"] != step:
        print(f"{path}: found of step {about['step']}, the model is of step {step}: made anew")
        return False
    return mixing is None or "memory" in about["arrays"]


def _open_data(config: config_lib.Config, path: str, cache: str) -> PreparedDataset:
    try:
        dataset = workdir_lib.open_dataset(config, cache)
    except InputError as error:
        raise InputError(
            f"{path}: not there yet for this model, and made from the prepared data ({error}); say "
            "where they are by --data"
        ) from None
    recorded = workdir_lib.content_hash(config.workdir)
    if dataset.content_hash != recorded:
        raise InputError(
            f"--data={config.data}: has other content than the run was trained on; expected "
            f"content hash {recorded[:12]}..., found {dataset.content_hash[:12]}..."
        )
    return dataset


def make_answers(
    path: str,
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    step: int,
    mixing: Mixing | None,
    block: int,
) -> None:
    """Encodes labels and, with memory, training queries, and keeps them."""
    vectors = model.encode_labels(params, labels, dataset.labels, block=block, title="labels")
    vectors = distributed.whole(vectors, dataset.num_labels, distributed.ALONE)
    memory = None
    if mixing is not None:
        memory = model.encode_queries(params, dataset.train, block=block, title="training queries")
        memory = distributed.whole(memory, len(dataset.train), distributed.ALONE)
    answers_lib.keep(path, dataset, step, vectors, memory)
