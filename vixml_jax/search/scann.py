"""Approximate search with ScaNN: a tree over quantised vectors; candidates are scored exactly."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.storage import atomic, json_files
from vixml_jax.structs import SearchResult

ABOUT = "index.json"
FORMAT = 2  # Of a saved index; raised when older ones can no longer be read.
FEW = 10_000  # With fewer labels a tree is no faster than scoring all of them.
SAMPLE = 250_000  # Maximum number of vectors from which the tree is learnt.
_REMEDY = "the index has to be built again"


class _About(msgspec.Struct):
    """Contents of `index.json`."""

    format: Literal[2]  # FORMAT.
    num_labels: int
    fingerprint: str
    settings: dict[str, Any]
    points: list[dict[str, Any]]


def settings_for(num_labels: int, *, fine: bool = False) -> dict[str, Any]:
    """Returns the build settings of an index, and the search settings used until it is tuned.

    With about sqrt(n) leaves, choosing leaves and scoring their contents cost the same. Labels near
    the boundary of two leaves lie in both (SOAR, Sun et al., NeurIPS 2023), so few leaves suffice:
    on embeddings of a trained tower the recall of the exact 100 best was 0.985 among 19,000 vectors
    and 0.99 among 120,000.

    Args:
      num_labels: Vectors of the index.
      fine: Use codes of twice the size, for vectors that the usual codes cannot distinguish.
    """
    if num_labels < FEW:
        return {"kind": "scann", "leaves": 0}
    leaves = round(math.sqrt(num_labels))
    return {
        "kind": "scann",
        "leaves": leaves,
        "soar_lambda": 1.5,
        "dimensions_per_block": 1 if fine else 2,
        "anisotropic_threshold": 0.2,
        "k": 100,  # The search settings below are meant for up to k results.
        "leaves_searched": max(30, leaves // 10),
        "reordered": 400,  # Candidates scored exactly.
    }


class ScannIndex:
    """Approximate maximum inner product search on all cores (Guo et al., ICML 2020).

    Sets too small for a tree (`leaves` is 0) are searched exactly.

    Attributes:
      settings: How the index was built and is searched.
      points: Tuned search settings, each for one k and recall; dicts with at least `k`,
        `leaves_searched` and `reordered`.
    """

    def __init__(
        self,
        searcher: Any,
        settings: dict[str, Any],
        fingerprint: str,
        num_labels: int,
        points: Sequence[dict[str, Any]] = (),
    ):
        """Not called directly: use `build` or `load`."""
        self.settings, self.points = settings, list(points)
        self._searcher, self._fingerprint, self._num_labels = searcher, fingerprint, num_labels

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
                soar_lambda=settings["soar_lambda"],
                overretrieve_factor=2.0,
            )
            builder.score_ah(
                settings["dimensions_per_block"],
                anisotropic_quantization_threshold=settings["anisotropic_threshold"],
            )
            builder.reorder(settings["reordered"])
        else:
            builder.score_brute_force()
        return ScannIndex(builder.build(), settings, _fingerprint(vectors), len(vectors))

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels found for each query, best first; absent = id -1, score -inf.

        If k exceeds the k that the settings are meant for, more leaves and candidates are used.
        """
        if not self.settings["leaves"]:
            return self._search(queries, k)
        k_real = min(k, self._num_labels)
        scale = max(1.0, k_real / self.settings["k"])
        # Many results are spread over many leaves: search enough to hold 16 times as many.
        needed = math.ceil(16 * k_real * self.settings["leaves"] / self._num_labels)
        searched = max(self.settings["leaves_searched"], needed if scale > 1.0 else 0)
        reordered = math.ceil(self.settings["reordered"] * scale)
        return self.search_with(queries, k, leaves_searched=searched, reordered=reordered)

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
            self._write_about(os.path.join(temporary, ABOUT))

    def save_points(self, directory: str | os.PathLike) -> None:
        """Writes only settings and points, into a directory that already holds this index."""
        with atomic.file(os.path.join(directory, ABOUT)) as temporary:
            self._write_about(temporary)

    def _write_about(self, path: str) -> None:
        about = _About(FORMAT, self._num_labels, self._fingerprint, self.settings, self.points)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(msgspec.structs.asdict(about), file, indent=2)

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
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{directory}: scann cannot read the index ({_one_line(error)}); {_REMEDY}"
            ) from None
        return ScannIndex(
            searcher, about.settings, about.fingerprint, about.num_labels, about.points
        )


def _read_about(directory: str) -> _About:
    """Reads `index.json`, and checks that ScaNN will not unpickle anything.

    Raises:
      InputError: If the file is missing or of another format, or the directory holds a pickle.
    """
    about = json_files.read(os.path.join(directory, ABOUT), _About, _REMEDY)
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
