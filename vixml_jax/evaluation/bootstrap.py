"""Confidence intervals of metrics, and significance of the difference between two runs.

Intervals are percentiles of the bootstrap over queries (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13). Two runs are compared with the paired randomisation test (Smucker,
Allan & Carterette, A Comparison of Statistical Significance Tests for Information Retrieval
Evaluation, CIKM 2007): under the null hypothesis the two results of each query are exchangeable.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.runtime import progress

LEVEL = 0.95  # Confidence level of the intervals.
RESAMPLES = 1000
PERMUTATIONS = 10_000
_BLOCK = 1024  # Queries processed at a time.
_PERMUTATIONS_BLOCK = 10_000  # Permutations of them applied at a time.
_RESAMPLES_BLOCK = 10_000  # Resamples drawn at a time.
# Rounding error of float32, relative to the sum of absolute values; closer sums count as equal.
_ROUNDING = 1e-7


class Comparison(NamedTuple):
    """Two runs compared by one metric, in percent.

    Attributes:
      one, other: The metric of the two runs.
      difference: one - other.
      low, high: Confidence interval of the difference.
      p_value: Two-sided p-value of the difference.
    """

    one: float
    other: float
    difference: float
    low: float
    high: float
    p_value: float


def resample(
    queries: PerQuery, *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "n m"]:
    """Returns all metrics in percent of each bootstrap resample of the queries.

    Args:
      queries: Terms of the metrics per query.
      resamples: Number of resamples; each draws as many queries as there are, with replacement.
      seed: Seed of the draws.
    """
    num = len(queries.values)
    sums = np.zeros((resamples, len(queries.names)))
    possible = np.zeros((resamples, len(queries.ratios)))
    firsts = range(0, resamples, _RESAMPLES_BLOCK)
    # Each part of the resamples has draws of its own.
    with progress.track("bootstrapped queries", num * len(firsts), unit="queries") as advance:
        for first in firsts:
            part = slice(first, min(first + _RESAMPLES_BLOCK, resamples))
            seed_of_part = (seed, first) if first else seed
            for block, weights in _draws(num, part.stop - first, seed_of_part):
                sums[part] += weights @ queries.values[block]
                possible[part] += weights @ queries.possible[block]
                advance(block.stop - block.start)
    return queries.means(sums, possible, num)


def intervals(
    queries: PerQuery, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns the 95 % confidence interval (low, high) of each metric, in percent."""
    low, high = _interval(resample(queries, resamples=resamples, seed=seed))
    return dict(zip(queries.names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def compare(
    one: PerQuery,
    other: PerQuery,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Returns the comparison of two runs on the same queries, by metric.

    The largest possible term of a query depends only on its true labels. PSP and PSnDCG of both
    runs therefore have the same denominator, and each difference is a sum over queries. The test is
    two-sided. The observed assignment counts as one of the permutations, so a p-value is never 0
    (Phipson & Smyth, Permutation P-values should never be zero, 2010).

    Args:
      one, other: Terms of the metrics per query of both runs.
      resamples: Bootstrap resamples for the intervals.
      permutations: Random exchanges of the two runs' results for the p-values.
      seed: Seed of both.

    Raises:
      InputError: If the runs were not evaluated on the same queries with the same metrics.
    """
    if one.names != other.names or one.values.shape != other.values.shape:
        raise InputError(
            f"found {len(one.values)} queries with {', '.join(one.names)} in one run and "
            f"{len(other.values)} with {', '.join(other.names)} in the other; expected the same "
            "queries and metrics: evaluate both runs again"
        )
    if not np.allclose(one.possible, other.possible, rtol=1e-5):
        raise InputError(
            "the two runs were evaluated with different true labels or label weights: evaluate "
            "both again"
        )
    differences = one._replace(values=one.values - other.values)
    low, high = _interval(resample(differences, resamples=resamples, seed=seed))
    p_values = _randomisation_test(differences.values, permutations, seed)
    columns = zip(
        one.metrics().values(),
        other.metrics().values(),
        differences.metrics().values(),
        low,
        high,
        p_values,
        strict=True,
    )
    return {
        name: Comparison(*map(float, column))
        for name, column in zip(one.names, columns, strict=True)
    }


def _draws(
    num: int, resamples: int, seed: int | tuple[int, int]
) -> Iterator[tuple[slice, Float[np.ndarray, "n b"]]]:
    """Yields blocks of queries and how often each resample contains each of them.

    The number of draws that fall into each block is drawn first, then the queries within the block.
    Together this is one multinomial draw of `num` queries per resample, but only one block of
    counts is in memory at a time.
    """
    rng = np.random.default_rng(seed)
    starts = np.arange(0, num, _BLOCK)
    sizes = np.minimum(_BLOCK, num - starts)
    counts = rng.multinomial(num, sizes / num, size=resamples)  # [n, blocks]
    row = np.arange(resamples)
    for start, size, count in zip(starts.tolist(), sizes.tolist(), counts.T, strict=True):
        at = rng.integers(size, size=int(count.sum()), dtype=np.int32)
        at += np.repeat(row * size, count).astype(np.int32)
        drawn = np.bincount(at, minlength=resamples * size).reshape(resamples, size)
        yield slice(start, start + size), drawn.astype(np.float32)


def _interval(
    values: Float[np.ndarray, "n m"],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _randomisation_test(
    differences: Float[np.ndarray, "q m"], permutations: int, seed: int
) -> Float[np.ndarray, " m"]:
    """Returns two-sided p-values of the column sums under random signs of the rows."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((permutations, differences.shape[1]))
    with progress.track("permuted queries", len(differences), unit="queries") as advance:
        for start in range(0, len(differences), _BLOCK):
            block = differences[start : start + _BLOCK].astype(np.float64)
            bits = rng.integers(256, size=(permutations, -(-len(block) // 8)), dtype=np.uint8)
            for first in range(0, permutations, _PERMUTATIONS_BLOCK):
                part = slice(first, first + _PERMUTATIONS_BLOCK)
                negated = np.unpackbits(bits[part], axis=1, count=len(block))
                sums[part] += block.sum(axis=0) - 2.0 * (negated.astype(np.float64) @ block)
            advance(len(block))
    observed = np.abs(differences.sum(axis=0, dtype=np.float64))
    tolerance = _ROUNDING * np.abs(differences).sum(axis=0, dtype=np.float64)
    as_extreme = np.count_nonzero(np.abs(sums) >= observed - tolerance, axis=0)
    return (1 + as_extreme) / (1 + permutations)
