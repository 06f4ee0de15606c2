"""One search for the scores of prototypes and of the label head: their vectors, concatenated.

The score of label l for query i is

    S_il = a q_i.z_l + c (SCALE g_i.w_l + b_l),

with the unit vectors q_i of the query and z_l of the prototype, and g_i, w_l and b_l of the label
head (`labels.head`). It is the inner product of [a q_i; c g_i; c] with [z_l; SCALE w_l; b_l], so
one index over the labels serves all weights a and c.

exp(S_il) divided by its sum over all labels is the probability that a label drawn from those of
the query is l. It is comparable between queries and between runs.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vixml_jax.labels.head import SCALE

MULTIPLE = 8  # Widths are padded with zeros to a multiple, which indexes are faster with.


class Fusion(NamedTuple):
    """Weights of both scores.

    Attributes:
      prototypes: Of the inner product of query and prototype, a.
      head: Of the logit of the label head, c.
    """

    prototypes: float
    head: float


def label_vectors(
    prototypes: Float[np.ndarray, "n e"],
    vectors: Float[np.ndarray, "n e"],
    bias: Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n w"]:
    """Returns the vectors [z; SCALE w; b] of labels, w = `width(e)`, float32."""
    return joined(prototypes, SCALE * vectors, bias)


def query_vectors(
    queries: Float[np.ndarray, "q e"], head_queries: Float[np.ndarray, "q e"], fusion: Fusion
) -> Float[np.ndarray, "q w"]:
    """Returns the vectors [a q; c g; c] of queries, w = `width(e)`, float32."""
    return joined(fusion.prototypes * queries, fusion.head * head_queries, fusion.head)


def joined(
    first: Float[np.ndarray, "n e"],
    second: Float[np.ndarray, "n e"],
    last: Float[np.ndarray, " n"] | float,
) -> Float[np.ndarray, "n w"]:
    """Returns the vectors [first; second; last], padded with zeros to `width(e)`, float32."""
    count, e = first.shape
    result = np.zeros((count, width(e)), np.float32)
    result[:, :e], result[:, e : 2 * e], result[:, 2 * e] = first, second, last
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
        vectors: Float[np.ndarray, "n e"],
        bias: Float[np.ndarray, " n"],
    ):
        self.shape = len(prototypes), width(prototypes.shape[1])
        self._parts = prototypes, vectors, bias

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float[np.ndarray, "m w"]:
        """Returns the vectors of a slice or an array of rows."""
        return label_vectors(*(part[rows] for part in self._parts))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # They are always made anew.
        return self[:].astype(dtype or np.float32, copy=False)


def width(e: int) -> int:
    """Returns the width of a fused vector, for embeddings of width e."""
    return -(-(2 * e + 1) // MULTIPLE) * MULTIPLE
