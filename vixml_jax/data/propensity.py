"""Inverse propensities of labels, from their frequencies in the training data."""

import numpy as np
from jaxtyping import Float, Int


def inverse_propensity(
    label_counts: Int[np.ndarray, " l"], num_queries: int, a: float, b: float
) -> Float[np.ndarray, " l"]:
    """Returns 1 + (ln N - 1)(B + 1)^A (n_l + B)^-A for each label; large for rare labels.

    See Jain, Prabhu & Varma, Extreme Multi-label Loss Functions (KDD 2016), section 4. If there are
    so few queries that ln N < 1, the result is 1 for all labels.

    Args:
      label_counts: n_l, the number of training queries of each label; may be 0.
      num_queries: N, the number of training queries.
      a: A of the data set (0.6 for Amazon, 0.5 for Wikipedia, else 0.55).
      b: B of the data set (2.6 for Amazon, 0.4 for Wikipedia, else 1.5).

    Returns:
      The inverse propensities, float32.
    """
    c = max(np.log(num_queries) - 1.0, 0.0) * (b + 1.0) ** a
    return (1.0 + c * (np.asarray(label_counts, np.float64) + b) ** -a).astype(np.float32)
