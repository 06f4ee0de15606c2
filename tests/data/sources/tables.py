"""Reads and prepares tables of tests."""

from vixml_jax.data import preprocessing
from vixml_jax.data.sources import tabular
from vixml_jax.data.sources.columns import Columns


def read(source, spool, **options):
    names = {key: options.pop(key) for key in list(options) if key in Columns.__dataclass_fields__}
    spool.mkdir(exist_ok=True)
    return tabular.read_tables(str(source), str(spool), names=Columns(**names), **options)


def prepare(source, out, **options):
    raw = preprocessing.read_source(str(source), str(out.parent), **options)
    settings = preprocessing.Settings(max_tokens=8, vocab_size=64)
    return preprocessing.prepare(raw, str(out), settings)


def texts_of(items):
    return [text for chunk in items.read_texts() for text in chunk]


def labels_of(raw, split):
    """The set of label texts of each query."""
    texts, relevance = texts_of(raw.labels), raw.splits[split].relevance
    return [
        {texts[label] for label in relevance.indices[a:b]}
        for a, b in zip(relevance.indptr, relevance.indptr[1:], strict=False)
    ]
