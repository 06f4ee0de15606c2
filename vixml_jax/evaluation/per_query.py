"""What each query adds to each metric: kept beside an evaluation, so that runs can be compared."""

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
    """Terms of the metrics that are means, or ratios of two means, over queries.

    A metric of `ratios` is the sum of its column of `values` over that of `possible`; any other one
    the mean of its column.
    """

    names: tuple[str, ...]
    values: Float32[np.ndarray, "q m"]
    ratios: tuple[str, ...]
    possible: Float32[np.ndarray, "q r"]

    def column(self, name: str) -> Float32[np.ndarray, " q"]:
        """What each query adds to a metric."""
        return self.values[:, self.names.index(name)]

    def means(
        self, sums: Float[np.ndarray, "*n m"], possible: Float[np.ndarray, "*n r"], count: float
    ) -> Float[np.ndarray, "*n m"]:
        """The metrics in percent, from sums over `count` queries of both columns."""
        of = np.full(sums.shape, float(count))
        of[..., [self.names.index(name) for name in self.ratios]] = possible
        return 100.0 * np.divide(sums, of, out=np.zeros_like(of), where=of > 0)

    def metrics(self) -> dict[str, float]:
        """All metrics in percent."""
        sums, possible = (x.sum(axis=0, dtype=np.float64) for x in (self.values, self.possible))
        return dict(zip(self.names, self.means(sums, possible, len(self.values)), strict=True))


class About(NamedTuple):
    """What was judged: only the same queries of the same data are compared."""

    dataset: str
    content_hash: str
    split: str
    search: str


def save(path: str | os.PathLike, found: PerQuery, about: About) -> None:
    """Writes an npz file, whole or not at all."""
    file = io.BytesIO()
    arrays = {"names": np.array(found.names), "ratios": np.array(found.ratios, np.str_)}
    arrays |= {"values": found.values, "possible": found.possible}
    np.savez_compressed(file, **arrays, about=np.array(about))
    atomic.write_bytes(path, file.getvalue())


def load(path: str | os.PathLike) -> tuple[PerQuery, About]:
    """What `save` wrote; nothing in it is unpickled.

    Raises:
      InputError: If there is no such file, or it is of something else.
    """
    try:
        data = io.BytesIO(epath.Path(path).read_bytes())
        with np.load(data, allow_pickle=False) as file:
            names, ratios = (tuple(file[part].tolist()) for part in ("names", "ratios"))
            found = PerQuery(names, file["values"], ratios, file["possible"])
            about = About(*file["about"].tolist())
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; python -m vixml_jax.evaluate --workdir=... writes it"
        ) from None
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{path}: not readable as what evaluate writes of queries ({error}); evaluate again"
        ) from None
    return found, about
