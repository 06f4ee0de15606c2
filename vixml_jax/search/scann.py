"""ScaNN: a tree over anisotropically quantised label vectors, the best of it scored exactly."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.structs import SearchResult

SETTINGS = "settings.json"
FEW = 10_000  # Up to so many labels, a tree gains nothing.


class ScannIndex:
    """Approximate search on all cores (Guo et al., ICML 2020).

    Attributes:
      settings: Leaves, leaves searched, candidates scored exactly; written with results.
    """

    def __init__(self, searcher: Any, settings: dict[str, Any], fingerprint: str):
        self._searcher, self.settings, self._fingerprint = searcher, settings, fingerprint

    @staticmethod
    def build(vectors: Float[np.ndarray, "n e"], *, reorder: int = 400) -> "ScannIndex":
        """Builds an index over label vectors with settings for their number.

        Args:
          vectors: float32; the score is the inner product.
          reorder: Candidates scored exactly; results asked for at most.

        Raises:
          InputError: Where scann is not installed.
        """
        pybind = _pybind()
        n = len(vectors)
        reorder = min(reorder, n)
        builder = pybind.builder(np.asarray(vectors, np.float32), min(100, n), "dot_product")
        if n < FEW:
            settings: dict[str, Any] = {"leaves": 0}
            builder = builder.score_brute_force()
        else:
            leaves = round(math.sqrt(n))
            settings = {
                "leaves": leaves,
                "leaves_searched": max(1, leaves // 5),
                "reordered": reorder,
            }
            builder = (
                builder.tree(
                    leaves, settings["leaves_searched"], training_sample_size=min(n, 250_000)
                )
                .score_ah(2, anisotropic_quantization_threshold=0.2)
                .reorder(reorder)
            )
        return ScannIndex(builder.build(), settings, fingerprint(vectors))

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """The k best labels found of each query, best first; absent = id -1, score -inf."""
        ids, scores = self._searcher.search_batched_parallel(
            np.asarray(queries, np.float32),
            final_num_neighbors=k,
            pre_reorder_num_neighbors=max(k, self.settings.get("reordered", k)),
        )
        scores = np.asarray(scores, np.float32)
        absent = ~np.isfinite(scores)
        short = max(0, k - scores.shape[1])
        return SearchResult(
            np.pad(
                np.where(absent, -np.inf, scores), ((0, 0), (0, short)), constant_values=-np.inf
            ),
            np.pad(
                np.where(absent, -1, np.asarray(ids).astype(np.int32)),
                ((0, 0), (0, short)),
                constant_values=-1,
            ),
        )

    def save(self, directory: str) -> None:
        """Writes the index under a temporary name and renames it; replaces an older one."""
        directory = os.path.abspath(directory)
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".scann.", dir=os.path.dirname(directory))
        try:
            self._searcher.serialize(temporary, relative_path=True)
            with open(os.path.join(temporary, SETTINGS), "w", encoding="utf-8") as file:
                json.dump({"settings": self.settings, "fingerprint": self._fingerprint}, file)
            shutil.rmtree(directory, ignore_errors=True)
            os.rename(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    @staticmethod
    def load(directory: str, vectors: Float[np.ndarray, "n e"]) -> "ScannIndex":
        """Reads an index that `save` wrote.

        Args:
          directory: Where it lies.
          vectors: The label vectors that it must be of.

        Raises:
          InputError: If there is none, or it is of other vectors.
        """
        path = os.path.join(directory, SETTINGS)
        try:
            with open(path, encoding="utf-8") as file:
                about = json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}; expected a saved index") from None
        if about["fingerprint"] != fingerprint(vectors):
            raise InputError(f"{directory}: was built of other label vectors; build it again")
        pybind, directory = _pybind(), os.path.abspath(directory)
        with open(os.path.join(directory, "scann_assets.pbtxt"), encoding="utf-8") as file:
            assets = file.read()
        # Not load_searcher, which would unpickle what lies in the directory.
        searcher = pybind.ScannSearcher(pybind.scann_pybind.ScannNumpy(directory, assets))
        return ScannIndex(searcher, about["settings"], about["fingerprint"])


def fingerprint(vectors: Float[np.ndarray, "n e"]) -> str:
    """SHA-256 of shape and values."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    digest = hashlib.sha256(str(vectors.shape).encode())
    digest.update(vectors.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _pybind() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise InputError(
            f"--search=scann: scann cannot be imported here ({error}); use --search=exact"
        ) from None
    return scann_ops_pybind
