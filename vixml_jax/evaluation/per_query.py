"""The terms that each query adds to each metric, saved with an evaluation to compare runs."""

import io
import os
import zipfile
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Float32

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic

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
        data = io.BytesIO(epath.Path(path).read_bytes())
        with np.load(data, allow_pickle=False) as file:
            names, ratios = (tuple(file[part].tolist()) for part in ("names", "ratios"))
            queries = PerQuery(names, file["values"], ratios, file["possible"])
            about = About(*file["about"].tolist())
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; python -m vixml_jax.evaluate --workdir=... writes it"
        ) from None
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{path}: not readable as a file of metrics per query ({error}); evaluate the run again"
        ) from None
    return queries, about
