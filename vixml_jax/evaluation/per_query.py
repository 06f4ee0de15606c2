"""The terms that each query adds to each metric, saved with an evaluation to compare runs."""

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Float32

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, npy_files, object_store, regular_files

SUFFIX = ".queries.npz"


class PerQuery(NamedTuple):
    """Terms per query of the metrics that are means over queries, or ratios of two such means.

    A metric of `ratios` is the sum of its column of `values` divided by the sum of its column of
    `possible`; every other metric is the mean of its column of `values`.

    Attributes:
      names: Metric of each column of `values`.
      values: Terms, as fractions, not percent.
      ratios: Metric of each column of `possible`.
      possible: The largest possible terms of these metrics.
    """

    names: tuple[str, ...]
    values: Float32[np.ndarray, "q m"]
    ratios: tuple[str, ...]
    possible: Float32[np.ndarray, "q r"]

    def column(self, name: str) -> Float32[np.ndarray, " q"]:
        """Returns the terms of one metric."""
        return self.values[:, self.names.index(name)]

    def means(
        self, sums: Float[np.ndarray, "*n m"], possible: Float[np.ndarray, "*n r"], count: float
    ) -> Float[np.ndarray, "*n m"]:
        """Returns the metrics in percent.

        Args:
          sums: Sums of the columns of `values` over `count` queries.
          possible: Sums of the columns of `possible` over the same queries.
          count: Number of queries.
        """
        totals = np.full(sums.shape, float(count))
        totals[..., [self.names.index(name) for name in self.ratios]] = possible
        return 100.0 * np.divide(sums, totals, out=np.zeros_like(totals), where=totals > 0)

    def metrics(self) -> dict[str, float]:
        """Returns all metrics in percent, by name."""
        sums, possible = (x.sum(axis=0, dtype=np.float64) for x in (self.values, self.possible))
        return dict(zip(self.names, self.means(sums, possible, len(self.values)), strict=True))


def gain(one: PerQuery, other: PerQuery, names: Sequence[str]) -> tuple[float, float]:
    """Returns by how much the mean of some metrics is larger in one ranking than in another.

    Args:
      one, other: Terms of two rankings of the same queries.
      names: The metrics.

    Returns:
      The difference in percentage points, and its standard error over the queries.
    """
    # The largest possible terms are the same for both, so the difference is a sum over queries.
    differences = (one.values - other.values).astype(np.float64)
    possible, count = one.possible.sum(axis=0, dtype=np.float64), len(differences)
    terms = count * one.means(differences, possible, count)
    mean = terms[:, [one.names.index(name) for name in names]].mean(axis=1)
    return float(mean.mean()), float(mean.std(ddof=1) / np.sqrt(count)) if count > 1 else np.inf


class About(NamedTuple):
    """What was evaluated; only results of the same queries can be compared.

    Attributes:
      dataset, content_hash: Name and content hash of the prepared data.
      split: 'train', 'valid' or 'test'.
      search: 'exact' or 'scann'.
      queries: Checksum of the ids of the queries; empty in files of version 0.3 and before.
    """

    dataset: str
    content_hash: str
    split: str
    search: str
    queries: str = ""


def save(path: str | os.PathLike, queries: PerQuery, about: About) -> None:
    """Writes an npz file, atomically."""
    file = io.BytesIO()
    arrays = {"names": np.array(queries.names), "ratios": np.array(queries.ratios, np.str_)}
    arrays |= {"values": queries.values, "possible": queries.possible}
    np.savez_compressed(file, **arrays, about=np.array(about))
    atomic.write_bytes(path, file.getvalue())


def load(path: str | os.PathLike) -> tuple[PerQuery, About]:
    """Reads a file written by `save`. Nothing in it is unpickled.

    Raises:
      InputError: If the file is missing, damaged or of another kind.
    """
    try:
        if object_store.is_local(path) and os.path.exists(path):
            regular_files.check(path)
        data = io.BytesIO(epath.Path(path).read_bytes())
        npy_files.check_archive(data)
        data.seek(0)
        with np.load(data, allow_pickle=False) as file:
            names, ratios = (tuple(file[part].tolist()) for part in ("names", "ratios"))
            queries = PerQuery(names, file["values"], ratios, file["possible"])
            about = About(*file["about"].tolist())
        _check(queries, about)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; python -m vixml_jax.evaluate --workdir=... writes it"
        ) from None
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many types for a damaged file.
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path}: not readable as a file of metrics per query ({reason}); evaluate the run "
            "again"
        ) from None
    return queries, about


def _check(queries: PerQuery, about: About) -> None:
    """Raises a ValueError if arrays do not fit together, or hold something else than numbers."""
    shape = len(queries.values), len(queries.names)
    for name, array, expected in (
        ("values", queries.values, shape),
        ("possible", queries.possible, (shape[0], len(queries.ratios))),
    ):
        if array.dtype.kind != "f" or array.shape != expected or not np.isfinite(array).all():
            raise ValueError(f"{name}: {array.dtype} {array.shape}, expected numbers {expected}")
    names = (*queries.names, *about)
    if not all(isinstance(name, str) for name in names) or {*queries.ratios} - {*queries.names}:
        raise ValueError(f"names {str(names)[:100]}")
