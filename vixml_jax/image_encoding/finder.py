"""Embeds the images that a data set or queries name: files, URLs and contents."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from vixml_jax.data.images import download, image_embeddings, image_reader, named_images
from vixml_jax.data.images.embedding_store import EmbeddingStore, Outcome, Parts
from vixml_jax.data.images.image_embeddings import FileImages
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.data.sources.raw import RawDataset
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import pipeline
from vixml_jax.image_encoding.encoder import ImageEncoder
from vixml_jax.runtime import processors
from vixml_jax.storage import atomic, locks
from vixml_jax.storage.resumable import Place

_ALONE = Place("")
_DECIDING = ".parts.lock"
_BROKEN = "broken.txt"


class _Downloaded(NamedTuple):
    """Where images are, once those that are URLs are downloaded.

    Attributes:
      file_of: File or content of each image.
      faults: Why others could not be downloaded.
    """

    file_of: dict[ImageSource, ImageSource]
    faults: dict[ImageSource, str]


class ImageFinder:
    """Embeds image files and URLs with a SigLIP model; resumes after an interruption.

    Args:
      model: Directory or Hugging Face name of the model.
      directory: Where embeddings and downloaded files are kept.
      keep_aspect: See `image_files.load_pixels`.
      batch: Number of images embedded together, at least.
      dtype: Compute dtype of the model.
      bounds: Limits of downloads.
      place: Which of how many processes that embed the images of a data set this is.

    Attributes:
      broken: Reason for each image that could not be embedded, by its path, its URL or, for an
        image whose content a table has, `image_reader.describe`.
      unfinished: Why the images of a data set are not all embedded by this and other processes;
        empty: they are.
    """

    def __init__(
        self,
        model: str,
        directory: str,
        *,
        keep_aspect: bool,
        batch: int,
        dtype: str,
        bounds: download.DownloadSettings,
        place: Place = _ALONE,
    ):
        self._model, self._directory, self._bounds = model, directory, bounds
        self._keep_aspect, self._batch, self._dtype = keep_aspect, batch, dtype
        self._place = place
        self._store: EmbeddingStore | None = None  # Of query images, once it has been opened.
        self.broken: dict[str, str] = {}
        self.unfinished = ""
        self._named = 0

    @functools.cached_property
    def _encoder(self) -> ImageEncoder:
        """The vision tower, loaded when first needed."""
        return ImageEncoder(self._model, keep_aspect=self._keep_aspect, dtype=self._dtype)

    def _open(self, directory: str, *, writable: bool = True) -> EmbeddingStore:
        encoder = self._encoder
        return EmbeddingStore(
            directory, width=encoder.width, about=encoder.about, writable=writable
        )

    @contextlib.contextmanager
    def _held_store(self) -> Iterator[EmbeddingStore]:
        """The embeddings of query images, to which no other process adds any meanwhile.

        Raises:
          InputError: If the directory cannot be written to, or its file system has no locks.
        """
        os.makedirs(self._directory, exist_ok=True)
        doing = "embedding images of queries"
        with locks.exclusive(self._directory, doing=doing, wait_s=math.inf):
            if self._store is None or not self._store.is_current():
                self._store = self._open(self._directory)
            yield self._store

    @property
    def used(self) -> bool:
        """Whether any image was given to embed."""
        return self._named > 0

    @contextlib.contextmanager
    def embed_dataset(
        self,
        raw: RawDataset,
        *,
        finishing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Iterator[RawDataset | None]:
        """Yields the data set with the embeddings of the images that it names.

        With several processes, each embeds its part of the images, and the one that is the last to
        end its part merges all. Parts are removed at the end of the context.

        Args:
          raw: The data set.
          finishing: Opens a lock, which only the process takes that is the last; raises InputError
            if another one holds it.

        Yields:
          The data set; None: other processes have not embedded their parts, or one of them is
          finishing; see `unfinished`.

        Raises:
          InputError: If it names images, but none of them could be embedded, or embeddings that
            come with it have another width; or if another process is finishing already, before
            anything is done.
        """
        named = named_images.parts(raw)
        items = [names for images in named.values() for names in images.by_item()]
        origins = {path: where for i in named.values() for path, where in i.origins.items()}
        sources = list(dict.fromkeys(source for item in items for source in item))
        parts = self._embed_part(sources, origins, finishing)
        with contextlib.ExitStack() as stack:
            if not self._is_last(parts, stack, finishing):
                yield None
                return
            store, outcomes = self._open(self._directory), parts.outcomes()
            parts.merge(store, outcomes, width=self._encoder.width, about=self._encoder.about)
            where = ", ".join(images.path for images in named.values())
            embedded = self._rows(
                where, items, dict(zip(sources, outcomes, strict=True)), store, origins
            )
            lines = (f"{name}\t{fault}\n" for name, fault in self.broken.items())
            atomic.write_text(os.path.join(self._directory, _BROKEN), "".join(lines))
            try:
                replaced = self._replaced(raw, named, embedded)
            except InputError:
                parts.remove()  # Files may be repaired: then all processes read them again.
                raise
            yield replaced
            parts.remove()

    def _embed_part(
        self,
        sources: Sequence[str],
        origins: Mapping[str, str],
        finishing: Callable[[], contextlib.AbstractContextManager],
    ) -> Parts:
        """Embeds the images that are this process's; returns all parts."""
        size = self._encoder.batch_size(self._batch)
        parts = Parts(
            self._directory,
            self._place,
            [origins.get(source, source) for source in sources],
            size * pipeline.CHUNK_BATCHES,
            [self._encoder.about, size],
        )
        with self._deciding(), finishing():  # Nobody merges what is begun again.
            parts.begin()
        own = [sources[number] for number in parts.own_numbers()]
        known = self._open(self._directory, writable=False).row_of
        left = parts.left(width=self._encoder.width, about=self._encoder.about)
        outcomes = self._outcomes(
            self._download(own, sources),
            self._open(parts.own),
            known,
            elsewhere={digest for store in left for digest in store.row_of},
        )
        parts.complete(outcomes[source] for source in own)
        return parts

    def _deciding(self) -> contextlib.AbstractContextManager[None]:
        """A short lock, under which parts begin and are found to be complete."""
        os.makedirs(self._directory, exist_ok=True)
        return locks.exclusive(
            self._directory, doing="looking for parts", wait_s=math.inf, name=_DECIDING
        )

    def _is_last(
        self,
        parts: Parts,
        stack: contextlib.ExitStack,
        finishing: Callable[[], contextlib.AbstractContextManager],
    ) -> bool:
        """Whether this process finishes the data set; its lock is then held by the stack."""
        with self._deciding():
            missing = parts.missing()
            if not missing:
                try:
                    stack.enter_context(finishing())
                except InputError as error:
                    self.unfinished = str(error)
            elif self._place.index in missing:
                self.unfinished = "another process has finished the data set"
            else:
                self.unfinished = (
                    f"missing: {_listed(missing)}; the process that is the last writes the data set"
                )
        return not self.unfinished

    def _replaced(
        self,
        raw: RawDataset,
        named: Mapping[str, named_images.NamedImages],
        embedded: FileImages,
    ) -> RawDataset:
        """The data set with embeddings in place of names."""
        if self._named and (embedded.rows < 0).all():
            name, fault = next(iter(self.broken.items()))
            raise InputError(
                f"--images={self._model}: none of the {self._named:,} images that {raw.name} names "
                f"could be embedded; the first is {name}: {fault}"
            )
        ends = np.cumsum([len(images.at) - 1 for images in named.values()])[:-1]
        parts = zip(named.items(), np.split(embedded.rows, ends), strict=True)
        images_of = {
            part: FileImages(rows, embedded.vectors, images.path)
            for (part, images), rows in parts
            if (rows >= 0).any()
        }
        raw = named_images.replace(raw, dict.fromkeys(named) | images_of)
        all_images = {part: queries.items.images for part, queries in raw.splits.items()}
        image_embeddings.check_widths(all_images | {"labels": raw.labels.images}, raw.name)
        return raw

    def embed(self, name: str, images: Sequence[Sequence[ImageSource]]) -> FileImages:
        """Embeds the images of queries.

        Args:
          name: Where the images are named, for messages.
          images: The images of each query: paths, URLs or contents.
        """
        sources = list(dict.fromkeys(source for item in images for source in item))
        downloaded = self._download(sources)
        with self._held_store() as store:
            outcomes = self._outcomes(downloaded, store, store.row_of)
            return self._rows(name, images, outcomes, store)

    def _outcomes(
        self,
        downloaded: _Downloaded,
        store: EmbeddingStore,
        known: Mapping[str, int],
        *,
        elsewhere: Iterable[str] = (),
    ) -> dict[ImageSource, Outcome]:
        """Embeds images.

        Args:
          downloaded: The images.
          store: Where their embeddings are added.
          known, elsewhere: See `pipeline.embed_files`.
        """
        outcomes = pipeline.embed_files(
            self._encoder,
            list(dict.fromkeys(downloaded.file_of.values())),
            store,
            known,
            elsewhere=elsewhere,
            batch=self._encoder.batch_size(self._batch),
            threads=processors.usable(),
        )
        found = {source: outcomes[file] for source, file in downloaded.file_of.items()}
        found |= {source: Outcome(fault=fault) for source, fault in downloaded.faults.items()}
        return found

    def _rows(
        self,
        name: str,
        images: Sequence[Sequence[ImageSource]],
        outcomes: Mapping[ImageSource, Outcome],
        store: EmbeddingStore,
        origins: Mapping[str, str] = MappingProxyType({}),
    ) -> FileImages:
        """The rows of each item's images in the store; others are noted in `broken`.

        Args:
          name: Where the images are named, for messages.
          images: The images of each item.
          outcomes: What became of each image.
          store: Their embeddings.
          origins: Names of some of the images, for messages.
        """
        self._named += sum(map(len, images))
        self.broken |= {
            origins.get(source, image_reader.describe(source)): outcome.fault
            for source, outcome in outcomes.items()
            if outcome.fault
        }
        found = [
            [store.row_of[outcomes[source].digest] for source in item if outcomes[source].digest]
            for item in images
        ]
        width = max(1, max(map(len, found), default=1))
        rows = np.full((len(images), width), -1, np.int64)
        for i, item in enumerate(found):
            rows[i, : len(item)] = item
        return FileImages(rows, store.vectors(), name)

    def _download(
        self, sources: Sequence[ImageSource], others: Sequence[ImageSource] = ()
    ) -> _Downloaded:
        """Downloads the images that are URLs.

        Args:
          sources: The images.
          others: See `download.download`.
        """
        urls = _urls(sources)
        if not urls:
            return _Downloaded({source: source for source in sources}, {})
        directory = os.path.join(self._directory, "files")
        downloaded, faults = download.download(
            urls, directory, others=_urls(others), settings=self._bounds
        )
        file_of = {x: downloaded.get(x, x) for x in sources if x not in faults}
        return _Downloaded(file_of, dict(faults))

    def describe(self) -> str:
        """A line on the number of images, and on those that could not be embedded."""
        line = f"images: {self._named} named in the source, embeddings in {self._directory}"
        if self.broken:
            path = os.path.join(self._directory, _BROKEN)
            name, fault = next(iter(self.broken.items()))
            line += f"; {len(self.broken)} missing or broken, listed in {path}"
            line += f"; the first is {name}: {fault}"
        return line


def _urls(sources: Sequence[ImageSource]) -> list[str]:
    return [x for x in sources if isinstance(x, str) and download.is_url(x)]


def _listed(indices: Sequence[int]) -> str:
    """Indices of processes, in words."""
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"the part of process {shown}" if len(indices) == 1 else f"those of processes {shown}"
