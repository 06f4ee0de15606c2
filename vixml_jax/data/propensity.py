"""Inverse propensities of labels from how often they occur in training."""

import numpy as np
from jaxtyping import Float, Int


def inverse_propensity(
    label_counts: Int[np.ndarray, " l"], num_queries: int, a: float, b: float
) -> Float[np.ndarray, " l"]:
    """1 + (ln N - 1)(B + 1)^A (n_l + B)^-A of each label, float32: large in the tail.

    Jain, Prabhu & Varma, Extreme Multi-label Loss Functions (KDD 2016), section 4. With so few
    queries that ln N < 1, all labels weigh 1.

    Args:
      label_counts: n_l, training queries of each label; may be 0.
      num_queries: N, training queries.
      a: A of the data set (0.55 in general, 0.6 for Amazon's, 0.5 for Wikipedia's).
      b: B of the data set (1.5, 2.6 and 0.4).
    """
    c = max(np.log(num_queries) - 1.0, 0.0) * (b + 1.0) ** a
    return (1.0 + c * (np.asarray(label_counts, np.float64) + b) ** -a).astype(np.float32)
