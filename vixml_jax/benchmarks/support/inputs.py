"""The data sets that benchmarks read."""

import tempfile

from vixml_jax.data import preprocessing
from vixml_jax.data.store import PreparedDataset


def open_data(name: str) -> PreparedDataset:
    """A prepared directory, or `glyphs`, prepared anew under the system's temporary directory."""
    if name != "glyphs":
        return PreparedDataset.open(name)
    where = tempfile.mkdtemp(prefix="vixml-") + "/glyphs"
    return preprocessing.prepare(
        preprocessing.read_source(preprocessing.GLYPHS), where, preprocessing.Settings()
    )
