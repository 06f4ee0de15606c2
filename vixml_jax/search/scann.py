"""Approximate search with ScaNN: a tree over quantised vectors; candidates are scored exactly."""

import hashlib
import math
import os
import platform
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Required, TypedDict

import msgspec
import numpy as np
from jaxtyping import Float, Int

from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.search.index import Normalised
from vixml_jax.storage import atomic, regular_files, sealed
from vixml_jax.structs import SearchResult

ABOUT = "index.json"
FORMAT = 2  # Of a saved index; raised when older ones can no longer be read.
# Columns that share 4 bits of a code, and those of fused vectors: finding the best of these takes
# so many leaves that codes of half the size are faster, although more candidates are scored again.
BLOCK, FUSED_BLOCK = 2, 4
FEW = 10_000  # With fewer labels a tree is no faster than scoring all of them.
SAMPLE = 250_000  # Maximum number of vectors from which the tree is learnt.
# Labels, drawn at random once, from which the sum of exp(score) over those not found is estimated;
# all labels if there are no more.
SUM_SAMPLE = 10_000
_MIN_FOUND = 100  # Labels retrieved at least for that sum, which count exactly.
_SUM_BLOCK = 256  # Queries whose scores of the sample are computed at a time.
_REMEDY = "the index has to be built again"


_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class _Settings(TypedDict, total=False):
    """The settings that a search reads, with the ranges of their values."""

    leaves: Required[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]]
    dimensions_per_block: _Count
    k: _Count
    leaves_searched: _Count
    reordered: _Count


class _Point(TypedDict, total=False):
    """The fields of a tuned point that are read, with the ranges of their values."""

    k: Required[_Count]
    recall_wanted: Required[_Share]
    recall: Required[_Share]
    leaves_searched: Required[_Count]
    reordered: Required[_Count]
    weights: list[float]


class _About(msgspec.Struct):
    """Contents of `index.json`.

    Attributes:
      format: FORMAT.
      num_labels: Vectors of the index.
      fingerprint: Of these vectors.
      settings, points: See `ScannIndex`.
      files: SHA-256 of each other file; empty in indexes of versions that did not record them.
    """

    format: Literal[2]
    num_labels: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    fingerprint: str
    settings: dict[str, Any]
    points: list[dict[str, Any]]
    files: dict[str, str] = {}


def settings_for(num_labels: int, *, dimensions_per_block: int = BLOCK) -> dict[str, Any]:
    """Returns the build settings of an index, and the search settings used until it is tuned.

    With about sqrt(n) leaves, choosing leaves and scoring their contents cost the same. Each label
    lies in one leaf: a second one (SOAR, Sun et al., NeurIPS 2023) doubles what a leaf costs, and
    was not faster at the same recall where it was measured.

    Args:
      num_labels: Vectors of the index.
      dimensions_per_block: Columns that share 4 bits of a code. Fewer make codes that are larger
        and distinguish more vectors.
    """
    if num_labels < FEW:
        return {"kind": "scann", "leaves": 0}
    leaves = round(math.sqrt(num_labels))
    return {
        "kind": "scann",
        "leaves": leaves,
        "dimensions_per_block": dimensions_per_block,
        "anisotropic_threshold": 0.2,
        "k": 100,  # The search settings below are meant for up to k results.
        "leaves_searched": max(60, leaves // 5),
        "reordered": max(400, 200 * dimensions_per_block),  # Candidates scored exactly.
    }


class ScannIndex:
    """Approximate maximum inner product search on all cores (Guo et al., ICML 2020).

    Sets too small for a tree (`leaves` is 0) are searched exactly.

    Attributes:
      settings: How the index was built and is searched.
      points: Tuned search settings, each for one k and recall; dicts with at least `k`,
        `leaves_searched` and `reordered`.
      log_sum: "sampled": `search_normalised` estimates the sum; "exact" with few labels.
    """

    def __init__(
        self,
        searcher: Any,
        settings: dict[str, Any],
        fingerprint: str,
        vectors: Float[np.ndarray, "n e"],
        points: Sequence[dict[str, Any]] = (),
    ):
        """Not called directly: use `build` or `load`."""
        self.settings, self.points = settings, list(points)
        self._files: dict[str, str] = {}  # As `index.json` lists them, once they are written.
        self._searcher, self._fingerprint, self._num_labels = searcher, fingerprint, len(vectors)
        self._sample = np.arange(len(vectors))
        if len(vectors) > SUM_SAMPLE:
            chosen = np.random.default_rng(0).permutation(len(vectors))[:SUM_SAMPLE]
            self._sample = np.sort(chosen)
        self.log_sum = "exact" if len(vectors) <= SUM_SAMPLE else "sampled"
        self._sample_vectors = np.asarray(vectors[self._sample], np.float32)

    @staticmethod
    def build(
        vectors: Float[np.ndarray, "n e"], settings: dict[str, Any] | None = None
    ) -> "ScannIndex":
        """Builds an index; equal vectors give equal indexes.

        Args:
          vectors: Label vectors; the id of a label is its row.
          settings: From `settings_for`; None: its defaults.

        Raises:
          InputError: If scann cannot be used on this machine.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        settings = settings_for(len(vectors)) if settings is None else settings
        builder = _import_scann().builder(vectors, 1, "dot_product")
        if settings["leaves"]:
            # ScaNN takes no seed, so a random start would not be reproducible.
            builder.tree(
                settings["leaves"],
                settings["leaves_searched"],
                training_sample_size=min(len(vectors), SAMPLE),
                random_init=False,
                spherical=True,  # Centres of length 1: dense leaves do not attract more queries.
            )
            builder.score_ah(
                settings["dimensions_per_block"],
                anisotropic_quantization_threshold=settings["anisotropic_threshold"],
            )
            builder.reorder(settings["reordered"])
        else:
            builder.score_brute_force()
        return ScannIndex(builder.build(), settings, _fingerprint(vectors), vectors)

    def search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> SearchResult:
        """Returns the k best labels found for each query, best first; absent = id -1, score -inf.

        If k exceeds the k that the settings are meant for, more leaves and candidates are used.
        Where too few labels are left without the removed ones, twice as many are searched for,
        until there are enough.
        """
        if removed is None or not len(removed):
            return self._search_all(queries, k)
        result = index.empty_result(len(queries), k)
        left = min(k, self._num_labels - len(removed))
        fetched, most = k, k + len(removed)  # Of the most, k are left.
        rows = np.arange(len(queries))
        while len(rows):
            found = self._search_all(queries[rows], fetched)
            result.scores[rows], result.ids[rows] = index.without(found, removed, k)
            if fetched == most:
                break
            rows = rows[np.count_nonzero(result.ids[rows] >= 0, axis=1) < left]
            fetched = min(2 * fetched, most)
        return result

    def _search_all(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        if not self.settings["leaves"]:
            return self._search(queries, k)
        k_real = min(k, self._num_labels)
        scale = max(1.0, k_real / self.settings["k"])
        # Many results are spread over many leaves: search enough to hold 16 times as many.
        needed = math.ceil(16 * k_real * self.settings["leaves"] / self._num_labels)
        searched = max(self.settings["leaves_searched"], needed if scale > 1.0 else 0)
        reordered = math.ceil(self.settings["reordered"] * scale)
        return self.search_with(queries, k, leaves_searched=searched, reordered=reordered)

    def search_normalised(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """See `Index`.

        The labels found count exactly. Of the others, a fixed sample of SUM_SAMPLE labels is
        scored, and each counts for as many labels as it represents. With at most SUM_SAMPLE labels
        the sum is exact.
        """
        removed = np.zeros(0, int) if removed is None else removed
        found = self.search(queries, max(k, min(_MIN_FOUND, self._num_labels)), removed)
        log_sum = np.full(len(queries), -np.inf, np.float32)
        for start in range(0, len(queries), _SUM_BLOCK):
            part = slice(start, start + _SUM_BLOCK)
            block = SearchResult(*(x[part] for x in found))
            log_sum[part] = self._log_sum(np.asarray(queries[part], np.float32), block, removed)
        return Normalised(SearchResult(*(x[:, :k] for x in found)), log_sum)

    def _log_sum(
        self,
        queries: Float[np.ndarray, "q e"],
        found: SearchResult,
        removed: Int[np.ndarray, " r"],
    ) -> Float[np.ndarray, " q"]:
        kept = self._num_labels - len(removed)
        if not kept:
            return np.full(len(queries), -np.inf, np.float32)
        scores = queries @ self._sample_vectors.T  # [q, sample]
        gone = np.isin(self._sample, removed)
        scores[:, gone] = -np.inf
        at = np.minimum(np.searchsorted(self._sample, found.ids), len(self._sample) - 1)
        query, column = np.nonzero((self._sample[at] == found.ids) & (found.ids >= 0))
        scores[query, at[query, column]] = -np.inf
        num_found = np.count_nonzero(found.ids >= 0, axis=1)
        num_sampled = np.count_nonzero(~gone) - np.bincount(query, minlength=len(queries))
        largest = np.maximum(scores.max(axis=1), found.scores.max(axis=1, initial=-np.inf))
        of_found, of_sample = (
            np.exp(x - largest[:, None]).sum(axis=1) for x in (found.scores, scores)
        )
        weight = (kept - num_found) / np.maximum(num_sampled, 1)
        return largest + np.log(of_found + weight * of_sample)

    def search_with(
        self, queries: Float[np.ndarray, "q e"], k: int, *, leaves_searched: int, reordered: int
    ) -> SearchResult:
        """Like `search`, with the given settings; the index must have leaves."""
        return self._search(
            queries,
            k,
            pre_reorder_num_neighbors=min(self._num_labels, max(k, reordered)),
            leaves_to_search=min(self.settings["leaves"], leaves_searched),
        )

    def _search(self, queries: Float[np.ndarray, "q e"], k: int, **options: int) -> SearchResult:
        k_real = min(k, self._num_labels)
        if not len(queries) or not k_real:
            return index.empty_result(len(queries), k)
        ids, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=k_real, **options
        )
        absent = np.isnan(scores)  # The searched leaves held fewer than k labels; the id is 0.
        scores = np.where(absent, np.float32(-np.inf), scores)
        return index.pad_columns(SearchResult(scores, np.where(absent, -1, ids.astype("i4"))), k)

    def use(self, point: dict[str, Any]) -> None:
        """Makes a point the search settings, and adds it to the points that are saved."""
        if point not in self.points:
            self.points.append(point)
        self.settings = {**self.settings, **point}

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the index atomically; replaces an older one."""
        with atomic.directory(directory) as temporary:
            self._searcher.serialize(temporary, relative_path=True)
            self._files = _digests(temporary)
            self._write_about(os.path.join(temporary, ABOUT))

    def save_points(self, directory: str | os.PathLike) -> None:
        """Writes only settings and points, into a directory that already holds this index."""
        self._write_about(os.path.join(directory, ABOUT))

    def _write_about(self, path: str) -> None:
        about = _About(
            FORMAT, self._num_labels, self._fingerprint, self.settings, self.points, self._files
        )
        sealed.write(path, msgspec.structs.asdict(about))

    @staticmethod
    def load(directory: str | os.PathLike, vectors: Float[np.ndarray, "n e"]) -> "ScannIndex":
        """Loads an index that `save` wrote.

        Args:
          directory: Of the index.
          vectors: Label vectors; the index must have been built from the same.

        Raises:
          InputError: If the index is missing, damaged or of other vectors, or scann cannot be used
            on this machine.
        """
        directory = os.path.abspath(directory)
        about = _read_about(directory)
        if about.fingerprint != _fingerprint(vectors):
            raise InputError(
                f"{directory}: found an index of {about.num_labels} other label vectors, expected "
                f"one of the {len(vectors)} label vectors given; {_REMEDY}"
            )
        scann = _import_scann()
        try:
            searcher = scann.load_searcher(directory, assets_backcompat_shim=False)
        except Exception as error:  # Of many kinds, depending on what of the files is damaged.
            raise InputError(
                f"{directory}: scann cannot read the index ({_one_line(error)}); {_REMEDY}"
            ) from None
        index = ScannIndex(searcher, about.settings, about.fingerprint, vectors, about.points)
        index._files = about.files
        return index


def _digests(directory: str) -> dict[str, str]:
    """SHA-256 of the files of an index by name, without that of `index.json`."""
    digests = {}
    for name in sorted(os.listdir(directory)):
        if name != ABOUT and not name.startswith(f"{ABOUT}."):  # Being written.
            with regular_files.open_binary(os.path.join(directory, name)) as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_about(directory: str) -> _About:
    """Reads `index.json`, and checks that ScaNN will read what it wrote, and unpickle nothing.

    Raises:
      InputError: If the file is missing, damaged or of another format, if another file does not
        match its checksum, or if the directory holds a pickle.
    """
    path = os.path.join(directory, ABOUT)
    about = sealed.read(path, _About, _REMEDY)
    try:
        settings = msgspec.convert(about.settings, _Settings)
        for point in about.points:
            msgspec.convert(point, _Point)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: settings: {error}; {_REMEDY}") from None
    if settings["leaves"] and len(settings) < len(_Settings.__annotations__):
        missing = sorted({*_Settings.__annotations__} - {*settings})
        raise InputError(f"{path}: settings: {', '.join(missing)} missing; {_REMEDY}")
    if about.files:
        found = _digests(directory)
        for name in sorted({*about.files, *found}):
            if found.get(name) != about.files.get(name):
                raise InputError(
                    f"{os.path.join(directory, name)}: does not match its checksum in {ABOUT}; "
                    f"{_REMEDY}"
                )
    # ScaNN unpickles names of rows from this file. We never write it, so it may be malicious.
    if os.path.exists(os.path.join(directory, "scann_docids.pkl")):
        raise InputError(f"{directory}: found scann_docids.pkl, expected no such file; {_REMEDY}")
    return about


def _fingerprint(vectors: Float[np.ndarray, "n e"]) -> str:
    """SHA-256 of the shape and the float32 values, in hexadecimal."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    digest = hashlib.sha256(str(vectors.shape).encode())
    digest.update(vectors.data)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def unavailable_reason() -> str | None:
    """Returns the reason why ScaNN cannot be used on this machine, in one line; None: it can.

    ScaNN needs Linux and, on x86, a processor with AVX2 and FMA, without which it kills the
    process.
    """
    missing = {"avx2", "fma"} - _processor_flags() if platform.machine() == "x86_64" else None
    if missing:
        return f"scann cannot be used: this processor lacks {' and '.join(sorted(missing))}"
    try:
        from scann.scann_ops.py import scann_ops_pybind  # noqa: F401
    except ImportError as error:
        return f"scann cannot be imported ({_one_line(error)})"
    return None


def _import_scann() -> Any:
    if reason := unavailable_reason():
        raise InputError(f"--search=scann: {reason}; use --search=exact")
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind


def _processor_flags() -> set[str]:
    """Feature flags of the processor; all required ones where the system does not list any."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("flags")]
    except OSError:
        lines = []
    return set(lines[0].split()) if lines else {"avx2", "fma"}
