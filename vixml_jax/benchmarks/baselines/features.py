"""TF-IDF features of the texts of a prepared data set, for linear baselines."""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from vixml_jax.data.store import PreparedDataset


class Features(NamedTuple):
    """Features of texts, float32 rows of unit length.

    Attributes:
      train: Of the training queries [t, f].
      queries: Of the queries of the evaluated split [q, f].
    """

    train: sparse.csr_matrix
    queries: sparse.csr_matrix


def tfidf(dataset: PreparedDataset, split: str) -> Features:
    """Returns TF-IDF of words and pairs of words, as scikit-learn makes it by default.

    A text without a known word has no features. Vocabulary and frequencies are those of the
    training queries.

    Args:
      dataset: Prepared data.
      split: 'test' or 'valid'.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), dtype=np.float32)
    train = vectorizer.fit_transform(_texts(dataset, "train"))
    return Features(train.tocsr(), vectorizer.transform(_texts(dataset, split)).tocsr())


def _texts(dataset: PreparedDataset, split: str):
    for chunk in getattr(dataset, split).texts.chunks():
        yield from chunk
