"""How certain metrics are, and whether two runs differ: resampled queries, swapped runs.

Intervals are percentiles of the bootstrap over queries (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13): what a metric would be, had other queries of the same kind been
judged. Whether two runs differ says the paired randomisation test (Smucker, Allan & Carterette, A
Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007): were
both equally good, the two results of each query might as well have been swapped.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.evaluation.per_query import PerQuery

LEVEL = 0.95  # Of the intervals.
RESAMPLES = 1000
PERMUTATIONS = 10_000
_BLOCK = 1024  # Queries at a time.
_ROUNDING = 1e-7  # Of float32, of a sum of sizes: what is so near is a tie.


class Comparison(NamedTuple):
    """Two runs by one metric, in percent."""

    one: float
    other: float
    difference: float  # one - other.
    low: float
    high: float
    p_value: float


def resample(
    found: PerQuery, *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "n m"]:
    """All metrics in percent of so many draws of as many queries, with replacement."""
    num = len(found.values)
    sums = np.zeros((resamples, len(found.names)))
    possible = np.zeros((resamples, len(found.ratios)))
    for queries, weights in _shown(_draws(num, resamples, seed), num, "intervals"):
        sums += weights @ found.values[queries]
        possible += weights @ found.possible[queries]
    return found.means(sums, possible, num)


def intervals(
    found: PerQuery, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The least and the largest of the middle 95 % of each metric, in percent."""
    low, high = _middle(resample(found, resamples=resamples, seed=seed))
    return dict(zip(found.names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def compare(
    one: PerQuery,
    other: PerQuery,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Each metric of two runs on the same queries: both, their difference, its interval, p-value.

    What a query can reach at most depends on its labels alone, so that of two runs PSP and PSnDCG
    have one denominator, and each difference is a sum over queries. The test is two-sided; its
    p-value counts what was found among what might have been, so it is never 0 (Phipson & Smyth,
    Permutation P-values should never be zero, 2010).

    Raises:
      InputError: If they are not of the same queries and metrics.
    """
    if one.names != other.names or one.values.shape != other.values.shape:
        raise InputError(
            f"found {len(one.values)} queries by {', '.join(one.names)}, and {len(other.values)} "
            f"by {', '.join(other.names)}; expected the same of both runs: evaluate both again"
        )
    if not np.allclose(one.possible, other.possible, rtol=1e-5):
        raise InputError("the two runs were judged by other true labels or weights: evaluate again")
    differences = one._replace(values=one.values - other.values)
    low, high = _middle(resample(differences, resamples=resamples, seed=seed))
    p_values = _randomise(differences.values, permutations, seed)
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


def _draws(num: int, resamples: int, seed: int) -> Iterator[tuple[slice, Float[np.ndarray, "n b"]]]:
    """Blocks of queries, and how often each resample has each one; every resample has `num`.

    How many fall into a block is drawn first, then which: together that is the multinomial draw of
    all, and never all of it is in memory.
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


def _shown(blocks: Iterable[Any], num: int, title: str) -> Iterable[Any]:
    """Blocks of queries with a bar, where they take long."""
    import tqdm

    return tqdm.tqdm(blocks, total=-(-num // _BLOCK), desc=title, delay=1, disable=None)


def _middle(
    values: Float[np.ndarray, "n m"],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _randomise(
    differences: Float[np.ndarray, "q m"], permutations: int, seed: int
) -> Float[np.ndarray, " m"]:
    """Two-sided p-values of the sums of the columns under random signs of the rows."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((permutations, differences.shape[1]))
    num = len(differences)
    for start in _shown(range(0, num, _BLOCK), num, "swaps"):
        block = differences[start : start + _BLOCK].astype(np.float64)
        bits = rng.integers(256, size=(permutations, -(-len(block) // 8)), dtype=np.uint8)
        swapped = np.unpackbits(bits, axis=1, count=len(block))
        sums += block.sum(axis=0) - 2.0 * (swapped.astype(np.float64) @ block)
    found = np.abs(differences.sum(axis=0, dtype=np.float64))
    tie = _ROUNDING * np.abs(differences).sum(axis=0, dtype=np.float64)
    as_far = np.count_nonzero(np.abs(sums) >= found - tie, axis=0)
    return (1 + as_far) / (1 + permutations)
