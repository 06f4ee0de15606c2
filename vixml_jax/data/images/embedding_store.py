"""Embeddings of image files on disk, by their content; made in parts where processes share them."""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float, Float16

from vixml_jax.data import mapped_rows
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import atomic, json_files
from vixml_jax.storage.resumable import Place

_OUTCOMES = "outcomes.jsonl"
_DIGESTS = re.compile(rb"(?:[0-9a-f]{64}\n)*")
_PART = re.compile(r"part(-\d{5}-of-\d{5})?")  # Names of `Place.part`.
_DAMAGED = (msgspec.DecodeError, UnicodeDecodeError)  # What JSON raises.
_MERGED = 1 << 12  # Rows copied at a time.


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of an image.

    Attributes:
      digest: SHA-256 of its content, if it has an embedding.
      fault: Why it has none.
    """

    digest: str = ""
    fault: str = ""


class EmbeddingStore:
    """Embeddings of image files by their content, float16, appended as they are computed.

    The directory has `vectors.f16` (rows), `digests.txt` (SHA-256 of the image file of each row,
    one a line) and `about.json` (the model). Rows that an interrupted run left incomplete, and all
    rows from a damaged digest on, are removed when the directory is opened, so that the work
    continues there.

    Attributes:
      row_of: Row of each SHA-256.
    """

    def __init__(
        self, directory: str, *, width: int, about: Mapping[str, Any], writable: bool = True
    ):
        """Opens the directory.

        Args:
          directory: Where the files are.
          width: Width of an embedding.
          about: The model and its settings, as JSON. Embeddings for which only `reader` differs,
            the version of `image_reader`, are removed.
          writable: Whether embeddings are added, by this process alone. If not, nothing is changed:
            another process may be adding some.

        Raises:
          InputError: If the directory has embeddings of another model.
        """
        self._directory, self._width = directory, width
        self._vectors = os.path.join(directory, "vectors.f16")
        self._digests = os.path.join(directory, "digests.txt")
        if writable:
            os.makedirs(directory, exist_ok=True)
        is_current = self._check(dict(about), writable)
        if writable:
            if not is_current:
                self._start(about)
            for name in (self._vectors, self._digests):
                open(name, "ab").close()
        self.row_of: dict[str, int] = {}
        is_there = os.path.exists(self._digests) and os.path.exists(self._vectors)
        if writable or (is_current and is_there):
            with open(self._digests, "rb") as file:
                digests = _DIGESTS.match(file.read())[0].decode().split("\n")[:-1]
            for row, digest in enumerate(digests[: os.path.getsize(self._vectors) // (2 * width)]):
                if self.row_of.setdefault(digest, row) != row:
                    break
        if writable:
            os.truncate(self._vectors, len(self.row_of) * 2 * width)
            os.truncate(self._digests, len(self.row_of) * 65)

    def _check(self, about: Mapping[str, Any], writable: bool) -> bool:
        """Whether the directory has embeddings that are those of `about`.

        Raises:
          InputError: If they are of another model.
        """
        path = os.path.join(self._directory, "about.json")
        if not os.path.exists(path):
            return False
        remedy = f"remove {self._directory} to embed the images again"
        stored = json_files.read(path, dict[str, Any], remedy)
        if stored == about:
            return True
        if stored | {"reader": about.get("reader")} != about:
            raise InputError(
                f"{path}: embeddings of another model or with other settings (found {stored}, "
                f"expected {about}); {remedy}"
            )
        if writable:
            console.status(
                f"{self._directory}: the images are embedded again, because they are read in "
                "another way now: upright, on white, and with more than 8 bits"
            )
        return False

    def _start(self, about: Mapping[str, Any]) -> None:
        """Writes `about.json` for an empty store, and removes embeddings of before."""
        for name in (self._digests, self._vectors):
            with contextlib.suppress(FileNotFoundError):
                os.remove(name)
        json_files.write(os.path.join(self._directory, "about.json"), dict(about))

    def add(self, digests: Sequence[str], vectors: Float[np.ndarray, "k v"]) -> None:
        """Appends the vectors of new files."""
        if not digests:
            return
        with open(self._vectors, "ab") as file:
            file.write(np.ascontiguousarray(vectors, np.float16).tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self._digests, "a", encoding="ascii") as file:
            file.write("".join(digest + "\n" for digest in digests))
        first = len(self.row_of)
        self.row_of |= {digest: first + i for i, digest in enumerate(digests)}

    def is_current(self) -> bool:
        """Whether the files have the rows of `row_of` and no others, which a process may add."""
        try:
            sizes = os.path.getsize(self._vectors), os.path.getsize(self._digests)
        except FileNotFoundError:
            return False
        return sizes == (len(self.row_of) * 2 * self._width, len(self.row_of) * 65)

    def vectors(self) -> Float16[np.ndarray, "m v"]:
        """All rows, memory-mapped."""
        if not self.row_of:
            return np.zeros((0, self._width), np.float16)
        return np.memmap(self._vectors, np.float16, "r", shape=(len(self.row_of), self._width))

    def merge(self, others: Sequence["EmbeddingStore"], images: Iterable[tuple[str, int]]) -> None:
        """Appends embeddings of other stores that this one lacks, in the order of `images`.

        Args:
          others: The stores.
          images: SHA-256 of each image, and the index of the store that has its embedding.
        """
        tables = [other.vectors() for other in others]
        lacking = ((digest, which) for digest, which in images if digest not in self.row_of)
        while taken := [*itertools.islice(lacking, _MERGED)]:
            block: dict[str, int] = {}
            for digest, which in taken:
                block.setdefault(digest, which)  # The first of equal images.
            vectors = np.empty((len(block), self._width), np.float16)
            which_of = np.fromiter(block.values(), np.int64, len(block))
            digests = np.array([*block])
            for which in np.unique(which_of):
                at = np.flatnonzero(which_of == which)
                rows = [others[which].row_of[digest] for digest in digests[at].tolist()]
                vectors[at] = tables[which][rows]
                mapped_rows.release(tables[which])
            self.add([*block], vectors)


class Parts:
    """Embeddings of the images of a data set, made in parts: by a process each, or by one.

    Each part is a store of its own in the directory of the store in which they are merged at the
    end. Its process holds its lock. When a part is complete, `outcomes.jsonl` in it says what
    became of each of its images. Images are dealt out in chunks: process i of n has every n-th
    chunk, from chunk i on. What processes of another number have left is used, too.
    """

    def __init__(self, store: str, place: Place, names: Sequence[str], chunk: int, of: Any):
        """Prepares for the part of this process.

        Args:
          store: Directory in which parts are merged.
          place: Which part of how many this process makes; its path is not read.
          names: Of all images, in order.
          chunk: Images of a chunk.
          of: All else that the parts depend on, as JSON: they are merged only if it is the same.
        """
        path = os.path.join(store, "part")
        self._places = [Place(path, index, place.count) for index in range(place.count)]
        own = {one.part for one in self._places}
        names_there = os.listdir(store) if os.path.isdir(store) else []
        found_parts = (os.path.join(store, name) for name in names_there if _PART.fullmatch(name))
        self._left = sorted(path for path in found_parts if path not in own)
        self._index, self._chunk, self._num_images = place.index, chunk, len(names)
        found = hashlib.sha256(msgspec.json.encode([of, chunk, place.count]))
        for name in names:
            found.update(f"{len(name)} {name}".encode(errors="surrogateescape"))
        self._of = found.hexdigest()

    @property
    def own(self) -> str:
        """Directory of the part of this process."""
        return self._places[self._index].part

    def owner(self, number: int) -> int:
        """The index of the process that embeds an image.

        Args:
          number: Of the image, from 0.
        """
        return number // self._chunk % len(self._places)

    def own_numbers(self) -> list[int]:
        """The images that this process embeds."""
        return [i for i in range(self._num_images) if self.owner(i) == self._index]

    def left(self, **about: Any) -> list[EmbeddingStore]:
        """The stores that processes of another number have left.

        Args:
          about: Of the parts; see `EmbeddingStore`.
        """
        return [EmbeddingStore(path, writable=False, **about) for path in self._left]

    def begin(self) -> None:
        """Says that the part of this process is not complete, if it was once."""
        os.makedirs(self.own, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.own, _OUTCOMES))

    def complete(self, outcomes: Iterable[Outcome]) -> None:
        """Says that the part of this process is complete, and what became of its images."""
        with (
            atomic.file(os.path.join(self.own, _OUTCOMES)) as temporary,
            open(temporary, "wb") as file,
        ):
            for line in ({"of": self._of}, *outcomes):
                file.write(msgspec.json.encode(line) + b"\n")

    def missing(self) -> list[int]:
        """The indices of the parts that are not complete, or are parts of something else."""
        return [i for i, place in enumerate(self._places) if self._of_part(place) != self._of]

    def _of_part(self, place: Place) -> str:
        with contextlib.suppress(FileNotFoundError, *_DAMAGED):
            with open(os.path.join(place.part, _OUTCOMES), "rb") as file:
                return msgspec.json.decode(file.readline(), type=dict[str, str]).get("of", "")
        return ""

    def outcomes(self) -> list[Outcome]:
        """What became of each image; all parts must be complete.

        Raises:
          InputError: If a part is damaged.
        """
        decoder = msgspec.json.Decoder(Outcome)
        of_part: list[list[Outcome]] = []
        for index, place in enumerate(self._places):
            path = os.path.join(place.part, _OUTCOMES)
            with open(path, "rb") as file:
                try:
                    found = [decoder.decode(line) for line in itertools.islice(file, 1, None)]
                except _DAMAGED as error:
                    raise InputError(
                        f"{path}: {error}; remove it and run process {index}"
                    ) from None
            expected = sum(self.owner(i) == index for i in range(self._num_images))
            if len(found) != expected:
                raise InputError(
                    f"{path}: found {len(found)} images, expected {expected}; remove it and run "
                    f"process {index} again"
                )
            of_part.append(found)
        lines = [iter(found) for found in of_part]
        return [next(lines[self.owner(i)]) for i in range(self._num_images)]

    def merge(self, store: EmbeddingStore, outcomes: Sequence[Outcome], **about: Any) -> None:
        """Adds the embeddings of all parts to a store, in the order of the images.

        Args:
          store: The store.
          outcomes: From `outcomes`.
          about: Of the parts; see `EmbeddingStore`.

        Raises:
          InputError: If an embedding is missing, as a part was damaged.
        """
        stores = [EmbeddingStore(place.part, writable=False, **about) for place in self._places]
        left = self.left(**about)

        def which(number: int, digest: str) -> int:
            owner = self.owner(number)
            if digest in stores[owner].row_of:
                return owner
            # Else it is not needed, as the store has it, or it was left.
            found = next((i for i, one in enumerate(left, len(stores)) if digest in one.row_of), -1)
            if found < 0 and digest not in store.row_of:
                raise InputError(
                    f"{self._places[owner].part}: lacks an embedding that it had; remove it and "
                    f"run process {owner} again"
                )
            return found

        found = enumerate(outcomes)
        store.merge(
            [*stores, *left], ((x.digest, which(i, x.digest)) for i, x in found if x.digest)
        )

    def remove(self) -> None:
        """Removes all parts."""
        for path in (*(place.part for place in self._places), *self._left):
            # First what says that it is complete: of a half-removed part nothing is used.
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(path, _OUTCOMES))
            shutil.rmtree(path, ignore_errors=True)
