"""The predictor behind the service: opened in the background, bounded, up to date with its labels.

Requests run in threads. Predictions of concurrent requests run as one batch
(`serving.coalescing`), and so do the images of their queries.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.image_encoding.encoder import NOT_FINITE, ImageEncoder
from vixml_jax.service import schema
from vixml_jax.serving import cold_start, explaining, label_updates
from vixml_jax.serving.coalescing import Coalescer
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.query_images import ignored_images

_IMAGES = 16  # Embedded together at most.


class Unavailable(Exception):
    """The service cannot answer now.

    Attributes:
      status: HTTP status.
      retry_after_s: Seconds after which another try may succeed; None: it will not.
    """

    def __init__(self, reason: str, status: int, retry_after_s: int | None = None):
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class Opened(NamedTuple):
    """What answers requests.

    Attributes:
      predictor: Of the run, warmed up.
      images: The vision model that embedded the run's images; None: image files are not read.
      train_texts: Of the training queries; None: the data of the run are not there.
    """

    predictor: Predictor
    images: ImageEncoder | None
    train_texts: Sequence[str] | None = None


class Settings(NamedTuple):
    """Limits of the service.

    Attributes:
      max_queries: Queries of a request.
      max_pending: Queries of all requests that are being answered or wait.
      timeout_s: Seconds after which a request ends without an answer.
      refresh_s: Seconds between looks for label updates of other processes.
    """

    max_queries: int
    max_pending: int
    timeout_s: float
    refresh_s: float


class Backend:
    """Answers queries and changes labels; several threads may use it.

    Attributes:
      settings: Limits.
      pending: Queries that are being answered or wait.
      failure: Why the run could not be opened; None: it could, or is still being opened.
      is_draining: Whether the service is about to end.
    """

    def __init__(self, settings: Settings, open_run: Callable[[], Opened]):
        """Starts to open the run in the background.

        Args:
          settings: Limits.
          open_run: Opens it and compiles all programs.
        """
        self.settings = settings
        self.pending, self.failure, self.is_draining = 0, None, False
        self._lock, self._opened, self._open_run = threading.Lock(), None, open_run
        self._changing = threading.Lock()  # Held while labels are changed, which takes memory.
        self._closed, self._loaded = threading.Event(), threading.Event()
        self._images = Coalescer(self._embed, _IMAGES)
        threading.Thread(target=self._run, daemon=True, name="labels").start()

    def _run(self) -> None:
        """Opens the run, then looks for label updates until the service ends."""
        try:
            self._opened = opened = self._open_run()
        except BaseException as error:  # Reported by the main thread.
            self.failure = error
            return
        finally:
            self._loaded.set()
        seen = None  # Labels may have changed while programs were compiled.
        while not self._closed.wait(self.settings.refresh_s):
            # Damaged, or out of reach for a while: the labels stay as they were until that is over.
            with contextlib.suppress(InputError, OSError):
                found = label_updates.state(opened.predictor.workdir)
                if found != seen:
                    opened.predictor.refresh()
                    seen = found

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def wait_until_loaded(self) -> None:
        """Waits until the run is open, or cannot be opened."""
        self._loaded.wait()

    @property
    def is_loading(self) -> bool:
        """Whether the run is still being opened."""
        return not self._loaded.is_set()

    def state(self) -> schema.State:
        """Whether queries are answered."""
        opened = self._opened
        if self.failure is not None:
            return schema.State(ready=False, reason=f"the run cannot be opened: {self.failure}")
        if opened is None:
            return schema.State(ready=False, reason="the run is being opened")
        predictor = opened.predictor
        return schema.State(
            ready=not self.is_draining,
            workdir=os.path.basename(os.path.abspath(predictor.workdir)),
            step=predictor.artifacts.about.step,
            num_labels=predictor.num_labels,
            reason="the service is about to end" if self.is_draining else "",
        )

    @property
    def opened(self) -> Opened:
        """What answers requests.

        Raises:
          Unavailable: If the run is not open yet.
        """
        opened = self._opened
        if opened is None:
            raise Unavailable(self.state().reason, 503, 1)
        return opened

    @contextlib.contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Counts queries as pending within the context.

        Raises:
          InputError: If a request has too many of them.
          Unavailable: If too many are pending already.
        """
        limit = self.settings.max_queries
        if count > limit:
            raise InputError(f"found {count:,} queries, expected at most {limit:,} in a request")
        with self._lock:
            if self.pending and self.pending + count > self.settings.max_pending:
                raise Unavailable(f"{self.pending:,} queries are waiting already", 429, 1)
            self.pending += count
        try:
            yield
        finally:
            with self._lock:
                self.pending -= count

    def predict(self, request: schema.PredictRequest, arrived: float) -> schema.PredictResponse:
        """Returns the labels of queries, which the caller has admitted.

        Args:
          request: The queries.
          arrived: When the request did, as `time.monotonic` tells.

        Raises:
          InputError: If a query is malformed.
          Unavailable: If there is no answer in time.
        """
        opened = self.opened
        with self._in_time(arrived, request.timeout_s) as left:
            images, notes = self._checked_images(opened, request.queries, left)
            found = opened.predictor(
                [query.text for query in request.queries],
                images,
                k=request.k,
                min_score=-np.inf if request.min_score is None else request.min_score,
                never=[query.never for query in request.queries],
                timeout=left(),
            )
        return schema.PredictResponse(
            results=[
                schema.Result(labels=[schema.Label(**x._asdict()) for x in labels], note=note)
                for labels, note in zip(found, notes, strict=True)
            ]
        )

    def explain(self, request: schema.ExplainRequest, arrived: float) -> schema.ExplainResponse:
        """Explains the labels of a query, which the caller has admitted; see `predict`."""
        opened = self.opened
        with self._in_time(arrived, None) as left:
            (images,), (note,) = self._checked_images(opened, [request.query], left)
        query = request.query
        found = explaining.explain(
            opened.predictor, query.text, images, k=request.k, never=query.never
        )
        texts = opened.train_texts
        return schema.ExplainResponse(
            labels=[
                schema.ExplainedLabel(
                    **x.label._asdict(),
                    prototype=x.prototype,
                    head=x.head,
                    neighbours=x.neighbours,
                )
                for x in found.labels
            ],
            neighbours=[
                schema.NearQuery(
                    text=texts[near.row] if texts is not None else None,
                    similarity=near.similarity,
                    labels=near.labels,
                )
                for near in found.neighbours
            ],
            note=note,
        )

    @contextlib.contextmanager
    def _in_time(self, arrived: float, seconds: float | None) -> Iterator[Callable[[], float]]:
        """Yields a function that returns the seconds that are left.

        Args:
          arrived: When the request did.
          seconds: That it may take; None: as many as the service allows.

        Raises:
          Unavailable: If there are none left.
        """
        deadline = arrived + min(self.settings.timeout_s, seconds or self.settings.timeout_s)

        def left() -> float:
            if (found := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            return found

        try:
            yield left
        except TimeoutError:
            raise Unavailable(
                f"no answer within {deadline - arrived:g} s, as too many queries wait", 503, 1
            ) from None

    def _checked_images(
        self, opened: Opened, queries: Sequence[schema.Query], left: Callable[[], float]
    ) -> tuple[list[np.ndarray | None], list[str]]:
        """The result of `_image_vectors`; every query has a text or an image.

        Raises:
          InputError: If one has neither.
        """
        images, notes = self._image_vectors(opened, queries, left)
        for number, (query, vectors) in enumerate(zip(queries, images, strict=True)):
            if not query.text.strip() and vectors is None:
                reason = notes[number] or "neither text nor image; expected one of them"
                raise InputError(f"query {number}: {reason}")
        return images, notes

    def _image_vectors(
        self,
        opened: Opened,
        items: Sequence[schema.Query | schema.NewLabel],
        left: Callable[[], float],
    ) -> tuple[list[np.ndarray | None], list[str]]:
        """Returns embeddings [j, v] or None for each item, and notes about ignored images.

        Args:
          opened: See `Opened`.
          items: Queries or labels.
          left: Returns the seconds that are left.
        """
        vectors: list[np.ndarray | None] = []
        notes, width = [], opened.predictor.image_width
        for item in items:
            embeddings = None
            if item.embeddings:
                widths = {len(row) for row in item.embeddings}
                if len(widths) > 1:
                    raise InputError(f"found embeddings of widths {sorted(widths)}; expected one")
                embeddings = np.array(item.embeddings, np.float32)
            note = ignored_images(
                width,
                embeddings,
                has_files=bool(item.images),
                reads_files=opened.images is not None,
            )
            fits = embeddings is not None and embeddings.shape[1] == width
            rows = [embeddings] if fits else []
            for content in () if note else item.images:
                found = self._images(content, size=1, timeout=left())
                if isinstance(found, str):
                    note = note or f"an image is ignored: {found}"
                else:
                    rows.append(found[None].astype(np.float32))
            vectors.append(np.concatenate(rows) if rows else None)
            notes.append(note)
        return vectors, notes

    def _embed(self, contents: Sequence[bytes]) -> list[Float16[np.ndarray, " v"] | str]:
        """Returns the embedding of each image, or why there is none."""
        encoder = self.opened.images
        pixels = [encoder.pixels(content) for content in contents]
        valid = [i for i, image in enumerate(pixels) if not isinstance(image, str)]
        results: list[Float16[np.ndarray, " v"] | str] = [*pixels]
        if valid:
            size = encoder.batch_size(1 if len(valid) == 1 else _IMAGES)
            vectors, finite = encoder.start([pixels[i] for i in valid], size)()
            for i, row, is_finite in zip(valid, vectors, finite, strict=True):
                results[i] = row.astype(np.float16) if is_finite else NOT_FINITE
        return results

    def labels(self, after: int, limit: int, contains: str) -> schema.LabelList:
        """Returns a page of the labels that can be found.

        Args:
          after: Row from which to look.
          limit: Labels of a page.
          contains: What the id or the text of a label must contain, in any case.
        """
        view, found, wanted = self.opened.predictor.view, [], contains.casefold()
        for row in view.rows(after):
            name, text = view.label(row)
            if wanted and wanted not in name.casefold() and wanted not in text.casefold():
                continue
            if len(found) == limit:
                return schema.LabelList(labels=found, num_labels=view.num_labels, next=row)
            found.append(schema.ListedLabel(id=name, text=text))
        return schema.LabelList(labels=found, num_labels=view.num_labels)

    @contextlib.contextmanager
    def _label_change(self) -> Iterator[Predictor]:
        """Changes labels one after the other, and shows them at once."""
        predictor = self.opened.predictor
        with self._changing, errors.writing("label_updates of the run"):
            yield predictor
            predictor.refresh()

    def add_labels(self, request: schema.AddRequest) -> schema.Changed:
        """Adds labels; once this returns, they are on disk and found.

        Raises:
          InputError: If a label exists already or is malformed, or if the disk is full.
        """
        opened, labels = self.opened, request.labels
        names = [label.id for label in labels]
        with self._label_change() as predictor:
            images, notes = self._image_vectors(opened, labels, lambda: self.settings.timeout_s)
            for label, vectors, note in zip(labels, images, notes, strict=True):
                if predictor.row_of(label.id) is not None:
                    raise InputError(f"label {label.id[:60]!r} exists already; remove it first")
                if vectors is None and not label.text.strip():
                    reason = note or "neither text nor image; expected one of them"
                    raise InputError(f"label {label.id[:60]!r}: {reason}")
            texts = [label.text for label in labels]
            examples = [label.examples for label in labels]
            cold_start.add_labels(predictor, names, texts, images, examples)
        return schema.Changed(changed=names, num_labels=predictor.num_labels)

    def remove_labels(self, request: schema.RemoveRequest) -> schema.Changed:
        """Removes labels; once this returns, that is on disk and they are not found.

        Raises:
          InputError: If there is no such label, or none would be left, or if the disk is full.
        """
        with self._label_change() as predictor:
            label_updates.remove(predictor.workdir, predictor.artifacts, request.ids)
        return schema.Changed(changed=request.ids, num_labels=predictor.num_labels)

    def undo(self) -> schema.Changed:
        """Takes back the last addition or removal.

        Raises:
          InputError: If there is none.
        """
        with self._label_change() as predictor:
            about = label_updates.undo(predictor.workdir)
        return schema.Changed(changed=about.ids, num_labels=predictor.num_labels)
