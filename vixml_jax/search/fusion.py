"""One search for the scores of prototypes, of the label head and of the frequency of labels.

The score of label l for query i is

    S_il = a q_i.z_l + c (SCALE g_i.w_l + b_l) + t log(1 + n_l),

with the unit vectors q_i of the query and z_l of the prototype, g_i, w_l and b_l of the label head
(`labels.head`), and n_l training queries of the label. It is the inner product of [a q_i; c g_i; c;
t] with [z_l; SCALE w_l; b_l; log(1 + n_l)], so one index over the labels serves all weights a, c
and t.

The last term is a prior (logit adjustment, arXiv 2007.07314, with the other sign). The head has
learnt which labels go with the queries of training. Where a query is unlike all of these, labels
that are as likely by the head differ in how often they are right, and frequent ones are right more
often.

exp(S_il) divided by its sum over all labels is the probability that a label drawn from those of
the query is l. It is comparable between queries and between runs.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import sparse

from vixml_jax.labels.head import SCALE

MULTIPLE = 8  # Widths are padded with zeros to a multiple, which indexes are faster with.
NUM_TERMS = 2  # Columns after the two embeddings: the terms that depend on the label alone.


class Fusion(NamedTuple):
    """Weights of the parts of a score.

    Attributes:
      prototypes: Of the inner product of query and prototype, a.
      head: Of the logit of the label head, c.
      frequency: Of log(1 + n) for a label with n training queries, t; below 0 rare labels gain.
    """

    prototypes: float
    head: float
    frequency: float = 0.0

    @property
    def depends_on_query(self) -> bool:
        """Whether scores are not the same for all queries."""
        return bool(self.prototypes or self.head)


class HeadRows(NamedTuple):
    """What is searched of labels beside their prototypes, for n labels.

    Attributes:
      vectors: Of the label head, w.
      bias: Of the label head, b.
      log_count: log(1 + n) of the number n of their training queries.
    """

    vectors: Float[np.ndarray, "n e"]
    bias: Float[np.ndarray, " n"]
    log_count: Float[np.ndarray, " n"]


def log_counts(relevance: sparse.csr_matrix) -> Float[np.ndarray, " n"]:
    """Returns log(1 + n) of the number n of training queries of each label, float32.

    Args:
      relevance: [training queries, labels].
    """
    counts = np.bincount(relevance.indices, minlength=relevance.shape[1])
    return np.log1p(counts).astype(np.float32)


def label_vectors(prototypes: Float[np.ndarray, "n e"], head: HeadRows) -> Float[np.ndarray, "n w"]:
    """Returns the vectors [z; SCALE w; b; log(1 + n)] of labels, w = `width(e)`, float32."""
    terms = np.stack([head.bias, head.log_count], axis=1)
    return joined(prototypes, SCALE * head.vectors, terms)


def query_vectors(
    queries: Float[np.ndarray, "q e"], head_queries: Float[np.ndarray, "q e"], fusion: Fusion
) -> Float[np.ndarray, "q w"]:
    """Returns the vectors [a q; c g; c; t] of queries, w = `width(e)`, float32."""
    terms = np.array([[fusion.head, fusion.frequency]], np.float32)
    return joined(fusion.prototypes * queries, fusion.head * head_queries, terms)


def joined(
    first: Float[np.ndarray, "n e"],
    second: Float[np.ndarray, "n e"],
    terms: Float[np.ndarray, "m t"],
) -> Float[np.ndarray, "n w"]:
    """Returns the vectors [first; second; terms], padded with zeros to `width(e)`, float32.

    One row of terms serves all vectors.
    """
    count, e = first.shape
    result = np.zeros((count, width(e)), np.float32)
    result[:, :e], result[:, e : 2 * e] = first, second
    result[:, 2 * e : 2 * e + NUM_TERMS] = terms
    return result


class LabelRows:
    """The result of `label_vectors`, each row made when it is read.

    Prototypes can thus stay in a memory-mapped file.

    Attributes:
      shape: Of the vectors, (n, w).
    """

    def __init__(
        self,
        prototypes: Float[np.ndarray, "n e"],
        head: HeadRows,
    ):
        self.shape = len(prototypes), width(prototypes.shape[1])
        self._prototypes, self._head = prototypes, head

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float[np.ndarray, "m w"]:
        """Returns the vectors of a slice or an array of rows."""
        return label_vectors(self._prototypes[rows], HeadRows(*(x[rows] for x in self._head)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # They are always made anew.
        return self[:].astype(dtype or np.float32, copy=False)


def width(e: int) -> int:
    """Returns the width of a fused vector, for embeddings of width e."""
    return -(-(2 * e + NUM_TERMS) // MULTIPLE) * MULTIPLE
