"""Embeds image files in batches: read and decoded on all cores, ahead of the devices.

Files are read twice, to find equal contents and to decode them, shortly after one another: a chunk
of some batches at a time. A batch depends only on its chunk and on what was known before all of
them, so that it is the same whichever process embeds it, and however often it was interrupted.
"""

import collections
import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vixml_jax.data.images import image_reader
from vixml_jax.data.images.embedding_store import EmbeddingStore, Outcome
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.image_encoding.encoder import NOT_FINITE, Embedded, ImageEncoder
from vixml_jax.runtime import background, progress

CHUNK_BATCHES = 16  # Batches whose files are read together to find equal contents.
# Batches of decoded images that wait for the devices at most, and that the devices have at most.
DECODED, EMBEDDING = 3, 2

_Pixels = UInt8[np.ndarray, "h w 3"] | str


class _Batch(NamedTuple):
    """Images embedded together.

    Attributes:
      images: Digest and source of the image in each place; None: it is embedded already.
      num_sources: Sources that are done when this batch is.
    """

    images: list[tuple[str, ImageSource] | None]
    num_sources: int


def embed_files(
    encoder: ImageEncoder,
    sources: Sequence[ImageSource],
    store: EmbeddingStore,
    known: Container[str],
    *,
    elsewhere: Iterable[str] = (),
    batch: int,
    threads: int,
) -> dict[ImageSource, Outcome]:
    """Embeds images that are neither known nor in the store, each distinct content once, in order.

    Args:
      encoder: Of the images.
      sources: Distinct paths of files, or their contents; several may have the same content.
      store: Stored embeddings, to which the new ones are added.
      known: SHA-256 of images that are left out of batches, since they have embeddings.
      elsewhere: SHA-256 of more images that have embeddings, but keep their places in batches, as
        those in the store do.
      batch: Number of images embedded at a time, a multiple of the number of devices.
      threads: Number of threads that decode files.

    Returns:
      The SHA-256 of each image that has an embedding, and why others have none.
    """
    digests: dict[ImageSource, str | OSError] = {}
    faults: dict[str, str] = {}  # By digest.
    with (
        futures.ThreadPoolExecutor(threads) as readers,
        futures.ThreadPoolExecutor(threads) as decoders,
        progress.track("images", len(sources), shown=bool(sources)) as done,
        contextlib.ExitStack() as stack,
    ):
        # Entered last, so that work that has not begun is dropped if this ends early.
        stack.callback(decoders.shutdown, cancel_futures=True)
        step = CHUNK_BATCHES * batch
        chunks = (sources[start : start + step] for start in range(0, len(sources), step))
        read = background.ahead(lambda chunk: [*readers.map(_digest_of, chunk)], chunks, 1)
        stack.enter_context(contextlib.closing(read))

        def planned() -> Iterator[_Batch]:
            found = {*store.row_of, *elsewhere}  # And planned to be.
            for start, chunk_digests in zip(range(0, len(sources), step), read, strict=True):
                chunk = dict(zip(sources[start : start + step], chunk_digests, strict=True))
                digests.update(chunk)
                yield from _batches(chunk, known, found, batch)

        for images, embedded, count in _embedded(planned(), encoder, decoders, batch):
            new: list[int] = []
            vectors, is_finite = embedded
            for place, (digest, fault) in images.items():
                if fault or not is_finite[place]:
                    faults[digest] = fault or NOT_FINITE
                else:
                    new.append(place)
            store.add([images[place][0] for place in new], vectors[new])
            done(count)
    return {source: _outcome(digest, faults) for source, digest in digests.items()}


def _digest_of(source: ImageSource) -> str | OSError:
    """SHA-256 of the content, or why it cannot be read."""
    try:
        return image_reader.digest(source)
    except OSError as error:
        return error


def _outcome(digest: str | OSError, faults: dict[str, str]) -> Outcome:
    if isinstance(digest, OSError):
        return Outcome(fault=str(digest))
    return Outcome(fault=faults[digest]) if digest in faults else Outcome(digest=digest)


def _batches(
    chunk: dict[ImageSource, str | OSError], known: Container[str], found: set[str], size: int
) -> Iterator[_Batch]:
    """Yields the batches of a chunk in which an image is to be embedded.

    The place of an image depends only on the chunk and on what is known.

    Args:
      chunk: Digest of each source.
      known: Digests of images that have no place.
      found: Digests of images that are embedded already; those of the chunk are added.
      size: Images of a batch.
    """
    first_of: dict[str, ImageSource] = {}  # Digest -> first image with this content.
    for source, digest in chunk.items():
        if isinstance(digest, str) and digest not in known:
            first_of.setdefault(digest, source)
    new = [None if one[0] in found else one for one in first_of.items()]
    found.update(first_of)
    parts = (new[start : start + size] for start in range(0, len(new), size))
    batches = [images for images in parts if any(images)] or [[]]
    for images in batches[:-1]:
        yield _Batch(images, len(images))
    yield _Batch(batches[-1], len(chunk) - sum(map(len, batches[:-1])))


def _embedded(
    batches: Iterable[_Batch], encoder: ImageEncoder, decoders: futures.Executor, size: int
) -> Iterator[tuple[dict[int, tuple[str, str]], Embedded, int]]:
    """Yields what became of each batch: digest and fault (or empty) of its places, embeddings."""
    started: collections.deque[tuple[dict, Callable[[], Embedded], int]] = collections.deque()

    def finish() -> tuple[dict[int, tuple[str, str]], Embedded, int]:
        images, embedded, count = started.popleft()
        return images, embedded(), count

    for batch, pixels in _decoded(batches, encoder, decoders):
        if len(started) == EMBEDDING:
            yield finish()
        images = {
            place: (one[0], found if isinstance(found, str) else "")
            for place, (one, found) in enumerate(zip(batch.images, pixels, strict=True))
            if one is not None
        }
        valid = [None if isinstance(found, str) else found for found in pixels]
        if any(found is not None for found in valid):
            embedded = encoder.start(valid, size)
        else:
            embedded = _nothing(len(valid), encoder.width)
        started.append((images, embedded, batch.num_sources))
    while started:
        yield finish()


def _nothing(count: int, width: int) -> Callable[[], Embedded]:
    return lambda: (np.zeros((count, width), np.float32), np.zeros(count, bool))


def _decoded(
    batches: Iterable[_Batch], encoder: ImageEncoder, decoders: futures.Executor
) -> Iterator[tuple[_Batch, list[_Pixels | None]]]:
    """Yields the pixels of each batch, or why there are none, in order; decodes batches ahead."""
    waiting: collections.deque[tuple[_Batch, list[futures.Future | None]]] = collections.deque()

    def first() -> tuple[_Batch, list[_Pixels | None]]:
        batch, decoding = waiting.popleft()
        return batch, [None if one is None else one.result() for one in decoding]

    for batch in batches:
        decoding = [
            None if one is None else decoders.submit(encoder.pixels, one[1]) for one in batch.images
        ]
        waiting.append((batch, decoding))
        if len(waiting) == DECODED:
            yield first()
    while waiting:
        yield first()
