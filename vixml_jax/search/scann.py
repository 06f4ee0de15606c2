"""ScaNN: a tree over quantised label vectors, whose best candidates are scored exactly."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.storage import atomic
from vixml_jax.structs import SearchResult

ABOUT = "index.json"
FORMAT = 2  # Of a saved index; raised when older ones can no longer be read.
FEW = 10_000  # Below so many labels a tree gains nothing over scoring all.


SAMPLE = 250_000  # Vectors at most from which the tree is learnt.


def settings_for(num_labels: int, *, fine: bool = False) -> dict[str, Any]:
    """The settings of an index over so many labels, and how it is searched until it is tuned.

    About sqrt(n) leaves make finding leaves and scoring what they hold cost alike. Labels near the
    border of two leaves lie in both (SOAR, Sun et al., NeurIPS 2023), so few leaves suffice: on
    embeddings of a trained tower the search found 0.985 of the exact 100 best among 19,000 vectors
    and 0.99 among 120,000.

    Args:
      num_labels: Vectors of the index.
      fine: Codes of twice the size, for vectors among which the usual ones tell too little.
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
        "k": 100,  # For so many results, or fewer:
        "leaves_searched": max(30, leaves // 10),
        "reordered": 400,  # Candidates scored exactly.
    }


class ScannIndex:
    """Approximate maximum inner product search on all cores (Guo et al., ICML 2020).

    Attributes:
      settings: How it was built and is searched; sets too small for a tree are searched exactly.
      points: How else it may be searched: settings tuned for some k, among them `k`,
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
        """Use `build` or `load`."""
        self.settings, self.points = settings, list(points)
        self._searcher, self._fingerprint, self._num_labels = searcher, fingerprint, num_labels

    @staticmethod
    def build(
        vectors: Float[np.ndarray, "n e"], settings: dict[str, Any] | None = None
    ) -> "ScannIndex":
        """Builds an index, the same for the same vectors.

        Args:
          vectors: Of the labels; a label's id is its row.
          settings: As `settings_for` makes them, which is also the default.

        Raises:
          InputError: Where scann cannot be imported.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        settings = settings_for(len(vectors)) if settings is None else settings
        builder = _import_scann().builder(vectors, 1, "dot_product")
        if settings["leaves"]:
            # Without a random start; ScaNN takes no seed.
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
        """Returns the k best labels found of each query, best first; absent = -1, score -inf.

        More results than the settings are meant for (`k` of them) take more leaves and candidates.
        """
        if not self.settings["leaves"]:
            return self._search(queries, k)
        few = min(k, self._num_labels)
        many = max(1.0, few / self.settings["k"])
        # Many results spread wide: leaves enough to hold 16 times as many.
        needed = math.ceil(16 * few * self.settings["leaves"] / self._num_labels)
        searched = max(self.settings["leaves_searched"], needed if many > 1.0 else 0)
        reordered = math.ceil(self.settings["reordered"] * many)
        return self.search_with(queries, k, leaves_searched=searched, reordered=reordered)

    def search_with(
        self, queries: Float[np.ndarray, "q e"], k: int, *, leaves_searched: int, reordered: int
    ) -> SearchResult:
        """As `search`, with other settings than the index's own; of an index that has leaves."""
        return self._search(
            queries,
            k,
            pre_reorder_num_neighbors=min(self._num_labels, max(k, reordered)),
            leaves_to_search=min(self.settings["leaves"], leaves_searched),
        )

    def _search(self, queries: Float[np.ndarray, "q e"], k: int, **options: int) -> SearchResult:
        few = min(k, self._num_labels)
        if not len(queries) or not few:
            empty = np.empty((len(queries), 0))
            return index.pad_columns(SearchResult(empty.astype("f4"), empty.astype("i4")), k)
        ids, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=few, **options
        )
        absent = np.isnan(scores)  # Where the leaves held fewer; the id is 0 there.
        scores = np.where(absent, np.float32(-np.inf), scores)
        return index.pad_columns(SearchResult(scores, np.where(absent, -1, ids.astype("i4"))), k)

    def use(self, point: dict[str, Any]) -> None:
        """Searches as a point says from now on, which is kept when the index is saved."""
        if point not in self.points:
            self.points.append(point)
        self.settings = {**self.settings, **point}

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the index, whole or not at all; replaces an older one."""
        with atomic.directory(directory) as temporary:
            self._searcher.serialize(temporary, relative_path=True)
            self._write_about(os.path.join(temporary, ABOUT))

    def save_points(self, directory: str | os.PathLike) -> None:
        """Writes settings and points alone, beside the index that `save` wrote or `load` read."""
        with atomic.file(os.path.join(directory, ABOUT)) as temporary:
            self._write_about(temporary)

    def _write_about(self, path: str) -> None:
        about = {
            "format": FORMAT,
            "num_labels": self._num_labels,
            "fingerprint": self._fingerprint,
            "settings": self.settings,
            "points": self.points,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(about, file, indent=2)

    @staticmethod
    def load(directory: str | os.PathLike, vectors: Float[np.ndarray, "n e"]) -> "ScannIndex":
        """Reads an index that `save` wrote.

        Args:
          directory: Where it lies.
          vectors: Of the labels: what it must have been built from.

        Raises:
          InputError: If there is none, it was built from other vectors or cannot be read, or scann
            cannot be imported.
        """
        directory = os.path.abspath(directory)
        about = _read_about(directory)
        if about["fingerprint"] != _fingerprint(vectors):
            raise InputError(
                f"{directory}: found an index of {about['num_labels']} other label vectors, "
                f"expected of these {len(vectors)}; build it anew"
            )
        scann = _import_scann()
        try:
            searcher = scann.load_searcher(directory, assets_backcompat_shim=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{directory}: found an index that scann cannot read ({_one_line(error)}); "
                "build it anew"
            ) from None
        fields = ("settings", "fingerprint", "num_labels", "points")
        return ScannIndex(searcher, *(about[field] for field in fields))


def _read_about(directory: str) -> dict[str, Any]:
    """What `save` wrote of the index."""
    path = os.path.join(directory, ABOUT)
    expected = f"expected a saved index of format {FORMAT}; build it anew"
    try:
        with open(path, encoding="utf-8") as file:
            about = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {_one_line(error)}; {expected}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{path}: found another format; {expected}")
    # ScaNN would unpickle names of the rows, of which we write none.
    if os.path.exists(os.path.join(directory, "scann_docids.pkl")):
        raise InputError(f"{directory}: found scann_docids.pkl, expected no such file")
    return about


def _fingerprint(vectors: Float[np.ndarray, "n e"]) -> str:
    """SHA-256 of the shape and the float32 values."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    digest = hashlib.sha256(str(vectors.shape).encode())
    digest.update(vectors.data)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def why_not() -> str | None:
    """Why ScaNN cannot be used here, in one line; None: it can.

    It needs Linux, and on x86 a processor with AVX2 and FMA, without which it would end the
    process.
    """
    missing = {"avx2", "fma"} - _processor_flags() if platform.machine() == "x86_64" else None
    if missing:
        return f"scann cannot be used here: this processor lacks {' and '.join(sorted(missing))}"
    try:
        from scann.scann_ops.py import scann_ops_pybind  # noqa: F401
    except ImportError as error:
        return f"scann cannot be imported here ({_one_line(error)})"
    return None


def _import_scann() -> Any:
    if reason := why_not():
        raise InputError(f"--search=scann: {reason}; use --search=exact")
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind


def _processor_flags() -> set[str]:
    """What the processor can do, as Linux tells; all that is asked for where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = [line for line in file if line.startswith("flags")]
    except OSError:
        found = []
    return set(found[0].split()) if found else {"avx2", "fma"}
