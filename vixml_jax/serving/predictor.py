"""Labels for new queries: a trained run, opened once, that answers from any number of threads."""

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Float16, Int

from vixml_jax import config as config_lib
from vixml_jax import processes, remote, retrieval, runs, sharding
from vixml_jax.data import encoder, packing, store, tokenize
from vixml_jax.data.store import Items, PreparedDataset, Ragged, Texts
from vixml_jax.encoding import Model
from vixml_jax.errors import InputError
from vixml_jax.search import augmented
from vixml_jax.search import index as index_lib
from vixml_jax.search.augmented import Mixing
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import Index
from vixml_jax.search.opening import open_index
from vixml_jax.serving import answers as answers_lib
from vixml_jax.serving import changes as changes_lib
from vixml_jax.serving.answers import Answers
from vixml_jax.structs import LabelState, SearchResult

SIZES = (1, 8, 64, 256)  # Items that go through the tower together; one program each or two.
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
    ):
        self.workdir, self.answers = workdir, answers
        self.model, self.params, self.labels, self.mixing = model, params, labels, mixing
        tower = model.tower.config
        self.image_width = tower.image_width if model.layout.num_images else 0
        self._index, self._memory = index, memory
        tokenizer = tokenize.load(answers.path, answers.about["max_tokens"])
        self._unknown = tokenizer.token_to_id("[UNK]")
        self._frame = sum(map(len, tokenize.special_tokens(tokenizer)))
        self._encoder, self._encoding = encoder.Encoder(tokenizer), threading.Lock()
        shards = sharding.num_row_shards(model.mesh)
        self._sizes = sorted({-(-size // shards) * shards for size in SIZES})
        self._shards = shards
        self.refresh()

    @staticmethod
    def load(
        workdir: str,
        *,
        search: str = "exact",
        values: flags.FlagValues | None = None,
        data: str = "",
        data_cache: str = remote.CACHE,
        mesh: str = "",
        warm: bool = True,
    ) -> "Predictor":
        """Opens a run; what it answers from is made first where it is missing or of another step.

        Args:
          workdir: That `train` wrote.
          search: 'exact' or 'scann'.
          values: With the flags of `retrieval.define_flags`; None: as tuned or trained.
          data: Prepared data, if they have moved; needed only where answers must be made.
          data_cache: Where data from a store of objects are copied to.
          mesh: If not as trained.
          warm: Whether to compile now what queries need, rather than at the first ones.

        Raises:
          InputError: If there is no such run, or answers cannot be made.
        """
        remote.check(workdir, "workdir")
        if not remote.is_local(workdir):
            raise InputError(
                f"--workdir={workdir}: labels and indexes are kept beside the run; copy it to this "
                "machine first"
            )
        config = config_lib.load(os.path.join(workdir, runs.CONFIG))
        config = runs.moved(config, workdir, data=data, mesh=mesh)
        tower, layout = runs.read_tower(workdir)
        path = os.path.join(workdir, answers_lib.DIRECTORY)
        _, step = runs.find_model(workdir)
        if values is None:
            mixing = retrieval.as_tuned(config.eval, workdir, step)
        else:
            mixing = retrieval.as_told(config.eval, values, workdir, step)
        fits = os.path.isdir(path) and _fits(path, step, mixing)
        if fits:
            num_labels = answers_lib.read_about(path)["num_labels"]
        else:
            dataset = _open_data(config, path, data_cache)
            num_labels = dataset.num_labels
        model = runs.build_model(config, tower, layout, num_labels, runs.make_mesh(config))
        params, labels, _ = runs.restore_model(workdir, model)
        if not fits:
            print(f"{path}: labels of {dataset.path} are encoded for step {step}")
            make_answers(path, model, params, labels, dataset, step, mixing, config.eval.block)
        answers = Answers.open(path)
        index = open_index(
            answers.vectors,
            kind=search,
            directory=os.path.join(path, "scann", "labels"),
            mesh=model.mesh,
        )
        memory = None
        if mixing is not None:
            memory = open_index(
                answers.memory,
                kind=search,
                directory=os.path.join(path, "scann", "memory"),
                mesh=model.mesh,
            )
        predictor = Predictor(
            workdir, model, params, labels, answers, index=index, memory=memory, mixing=mixing
        )
        if warm:
            predictor.warm_up()
        return predictor

    def refresh(self) -> None:
        """Takes up labels that were added or removed since."""
        changes = changes_lib.read(self.workdir, self.answers)
        added = ExactIndex(changes.vectors, mesh=self.model.mesh) if len(changes.ids) else None
        self._changes, self._added = changes, added
        self._row_of: dict[str, int] | None = None

    @property
    def num_labels(self) -> int:
        """Labels that can be found."""
        changes = self._changes
        return len(self.answers.ids) + len(changes.ids) - len(changes.removed)

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        k: int = 10,
        min_score: float = -np.inf,
        never: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Prediction]]:
        """The best labels of each query, best first.

        Args:
          texts: Of the queries.
          images: Of each query, the embedding of its picture [v], of several [j, v], or None.
          k: Labels a query at most.
          min_score: Labels below are left out.
          never: Ids of labels that are not to be predicted, of each query.

        Raises:
          InputError: If pictures are of another width than the model reads, or labels unknown.
        """
        vectors = self.encode(texts, images)
        pairs = self._pairs(never, len(texts))
        found = self.search(vectors, k, pairs)
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
        source, at = (self.answers, row) if row < own else (self._changes, row - own)
        return source.ids[at], source.texts[at]

    def row_of(self, name: str) -> int | None:
        """The row of a label by its id; None: there is none."""
        if self._row_of is None:
            own = (name for chunk in self.answers.ids.chunks() for name in chunk)
            rows = {name: row for row, name in enumerate(own)}
            first = len(rows)
            rows |= {name: first + i for i, name in enumerate(self._changes.ids)}
            gone = set(self._changes.removed.tolist())
            self._row_of = {name: row for name, row in rows.items() if row not in gone}
        return self._row_of.get(name)

    def search(
        self,
        vectors: Float[np.ndarray, "q e"],
        k: int,
        pairs: Int[np.ndarray, "f 2"] | None = None,
    ) -> SearchResult:
        """The k best labels of unit query vectors, those that were added too.

        Args:
          vectors: Of the queries.
          k: Columns; rows are short where there are fewer labels.
          pairs: (query, label) never to be found.
        """
        changes = self._changes
        pairs = np.zeros((0, 2), np.int64) if pairs is None else pairs
        more = len(changes.removed) + index_lib.over_fetch(pairs)
        # Few numbers of columns, so that few programs are compiled.
        wanted = k + (1 << (more - 1).bit_length() if more else 0)
        result = self._index.search(vectors, wanted)
        if self._added is not None:
            added = self._added.search(vectors, min(wanted, len(changes.ids)))
            result = _merge(result, added, len(self.answers.ids), wanted)
        if self.mixing is not None:
            near = self._memory.search(vectors, max(self.mixing.k, wanted))
            relevance = changes.widen(self.answers.relevance)
            result = augmented.mix_in_memory(result, near, relevance, self.mixing, wanted)
        gone = np.isin(result.ids, changes.removed)
        if gone.any():
            result = index_lib.without(result, gone)
        return index_lib.drop_filtered(result, pairs, k)

    def encode(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "q e"]:
        """Unit vectors of queries, by the programs that `warm_up` compiles."""
        items = self.items(texts, images)
        found = np.empty((len(texts), self.model.table.width), np.float32)
        for start in range(0, len(texts), self._sizes[-1]):
            count = min(self._sizes[-1], len(texts) - start)
            size = next(size for size in self._sizes if size >= count)
            ids = np.full(size, -1)
            ids[:count] = np.arange(start, start + count)
            packed = self._pack(items, ids)
            found[start : start + count] = np.asarray(
                self.model.encode_packed(
                    self.params, sharding.to_devices(packed, self.model.mesh), size
                )
            )[:count]
        return found

    def items(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Texts and pictures as prepared data hold them."""
        with self._encoding:
            tokens = self._encoder.encode([text[:MOST_CHARACTERS] for text in texts])
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        pictures = None
        if images is not None and self.image_width:
            pictures = self._pictures(images, len(texts))
        return Items(Texts(np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)),
                     Ragged(tokens.values, offsets), pictures)  # fmt: skip

    def unknown(self, items: Items) -> list[bool]:
        """Whether a text has words, and none that the tokenizer knows."""
        values, offsets = items.tokens
        return [
            b - a > self._frame
            and self._unknown is not None
            and np.count_nonzero(values[a:b] != self._unknown) == self._frame
            for a, b in zip(offsets, offsets[1:], strict=False)
        ]

    def warm_up(self, k: int = 10) -> None:
        """Compiles what queries need, so that none waits for it."""
        for size in self._sizes:
            for words in (1, self.answers.about["max_tokens"]):
                self.search(self.encode(["a " * words] * size), k)

    def _pack(self, items: Items, ids: Int[np.ndarray, " b"]) -> Any:
        """Rows enough for items of common length, else for the longest: two shapes a size."""
        each = len(ids) // self._shards
        width, layout = self.model.row_width, self.model.layout
        longest = min(width, self.answers.about["max_tokens"] + layout.overhead)
        common = min(longest, 1.5 * self.answers.about["mean_tokens"] + layout.overhead)
        most = -(-each // (width // longest))
        few = min(most, max(1, -(-round(each * common) // width)))
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
        rows: list[Float16[np.ndarray, "j v"]] = []
        for query, found in enumerate(images):
            found = np.zeros((0, self.image_width)) if found is None else np.asarray(found)
            found = found.reshape(-1, found.shape[-1]) if found.ndim else found
            if found.ndim != 2 or found.shape[1] != self.image_width:
                raise InputError(
                    f"query {query}: found a picture of shape {np.shape(images[query])}, expected "
                    f"embeddings {self.image_width} wide"
                )
            rows.append(found.astype(np.float16))
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        return Ragged(np.concatenate(rows), offsets)

    def _pairs(
        self, never: Sequence[Sequence[str]] | None, count: int
    ) -> Int[np.ndarray, "f 2"] | None:
        if never is None or not any(never):
            return None
        found = []
        for query, names in enumerate(never):
            for name in names:
                row = self.row_of(name)
                if row is None:
                    raise InputError(f"query {query}: label {name!r} is not among the labels")
                found.append((query, row))
        return np.array(found)


def _merge(result: SearchResult, added: SearchResult, first: int, k: int) -> SearchResult:
    """The k best of two, the ids of the second counted from `first`."""
    ids = np.where(added.ids >= 0, added.ids + first, -1)
    scores = np.concatenate([result.scores, added.scores], axis=1)
    ids = np.concatenate([result.ids, ids], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return SearchResult(
        np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    )


def _fits(path: str, step: int, mixing: Mixing | None) -> bool:
    """Whether answers are of this step, and have the memory that is wanted; says if not."""
    about = answers_lib.read_about(path)
    if about["step"] != step:
        print(f"{path}: found of step {about['step']}, the model is of step {step}: made anew")
        return False
    return mixing is None or "memory" in about["arrays"]


def _open_data(config: config_lib.Config, path: str, cache: str) -> PreparedDataset:
    try:
        dataset = runs.open_dataset(config, cache)
    except InputError as error:
        raise InputError(
            f"{path}: not there yet for this model, and made from the prepared data ({error}); say "
            "where they are by --data"
        ) from None
    recorded = runs.content_hash(config.workdir)
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
    vectors = processes.whole(vectors, dataset.num_labels)
    memory = None
    if mixing is not None:
        memory = model.encode_queries(params, dataset.train, block=block, title="training queries")
        memory = processes.whole(memory, len(dataset.train))
    answers_lib.keep(path, dataset, step, vectors, memory)
