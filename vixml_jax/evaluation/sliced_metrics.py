"""All metrics of a search, told apart by groups of labels and of queries, in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.metrics import Judged
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.evaluation.slices import Groups


class Judgement(NamedTuple):
    """What there is to say of a search.

    Attributes:
      queries: What each query adds to each metric.
      groups: By kind of group and name of the group: its `metrics` in percent, and how many
        `labels` and `queries` it has and how many true `pairs`; of groups of labels, `queries` are
        those that have a true label in it. Empty groups are left out; of labels that are true of
        no query there are no metrics.
    """

    queries: PerQuery
    groups: dict[str, dict[str, dict[str, Any]]]


def judge(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    label_groups: Mapping[str, Groups],
    query_groups: Mapping[str, Groups],
    ks: Sequence[int] = (1, 3, 5),
    recall_ks: Sequence[int] = (10, 100),
) -> Judgement:
    """Returns the metrics of each group, defined as in `metrics.compute_metrics`.

    A group of queries has the metrics of these queries alone. To a group of labels belong the hits
    with labels of that group: its P, nDCG, PSP, PSnDCG, MAP and MRR are what these add to those of
    all labels, over all queries, so that the groups sum to the whole. Its R and coverage are those
    that it would have if its labels were the only true ones: R is the mean over the queries that
    have one of them.

    Args:
      ids, relevance, inverse_propensity, ks, recall_ks: As of `metrics.compute_metrics`.
      label_groups, query_groups: By kind.
    """
    cuts = (*ks, *recall_ks)
    num_queries, num_labels = relevance.shape
    by_label = {kind: _OfLabels(groups) for kind, groups in label_groups.items()}
    by_query = {kind: _OfQueries(groups, num_labels) for kind, groups in query_groups.items()}
    best_rank = np.full(num_labels, metrics.NEVER, np.int32)
    occurs = np.zeros(num_labels, bool)
    found: dict[str, np.ndarray] = {}
    for block in metrics.judge_blocks(
        ids, relevance, inverse_propensity, ks=ks, recall_ks=recall_ks
    ):
        if not found:
            found = {
                part: np.zeros((num_queries, len(columns)), np.float32)
                for part, columns in (("values", block.gains), ("possible", block.possible))
            }
        for column, gains in enumerate(block.gains.values()):
            found["values"][block.queries, column] = _sum_at(
                block.query, len(found["values"][block.queries]), gains
            )
        for column, most in enumerate(block.possible.values()):
            found["possible"][block.queries, column] = most
        np.minimum.at(best_rank, block.label, block.rank)
        occurs[block.true.indices] = True
        for of in (*by_label.values(), *by_query.values()):
            of.add(block)
        names, ratios = tuple(block.gains), tuple(block.possible)
    queries = PerQuery(names, found["values"], ratios, found["possible"])
    of_labels = {kind: of.finish(best_rank, occurs, cuts) for kind, of in by_label.items()}
    return Judgement(queries, of_labels | {kind: of.finish(cuts) for kind, of in by_query.items()})


def _sum_at(at: Int[np.ndarray, " h"], size: int, values: Any) -> Float[np.ndarray, " size"]:
    return np.bincount(at, weights=values, minlength=size)[:size]


class _OfLabels:
    """Sums over the hits with labels of each group; those of none stand in a last column."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self.size = len(groups.names) + 1
        self.sums: dict[str, Float[np.ndarray, " g"]] = {}
        self.possible: dict[str, float] = {}  # Of all labels.
        self.num_queries = 0
        self.pairs = np.zeros(self.size, np.int64)
        self.queries = np.zeros(self.size, np.int64)

    def add(self, block: Judged) -> None:
        of, size = self.groups.of, self.size
        num = block.true.shape[0]
        self.num_queries += num
        for name, most in block.possible.items():
            self.possible[name] = self.possible.get(name, 0.0) + float(most.sum())
        owner = np.repeat(np.arange(num), np.diff(block.true.indptr))
        group = of[block.true.indices] % size
        pairs = np.bincount(owner * size + group, minlength=num * size).reshape(num, size)
        self.pairs += pairs.sum(axis=0)
        self.queries += np.count_nonzero(pairs, axis=0)
        group = of[block.label] % size
        for name, gains in block.gains.items():
            if name.startswith("R@"):  # Of the group's own labels instead of all.
                gains = (gains > 0) / pairs[block.query, group]
            self.sums[name] = self.sums.get(name, 0.0) + _sum_at(group, size, gains)

    def finish(
        self,
        best_rank: Int[np.ndarray, " l"],
        occurs: Bool[np.ndarray, " l"],
        cuts: Sequence[int],
    ) -> dict[str, dict[str, Any]]:
        """The metrics of each group, given the best rank of each label and whether it occurs."""
        found = {}
        for i, name in enumerate(self.groups.names):
            inside = self.groups.of == i
            if not inside.any():
                continue
            values = metrics.coverage(best_rank[inside & occurs], cuts)
            for metric, sums in self.sums.items():
                of = self.possible.get(metric, float(self.num_queries))
                if metric.startswith("R@"):
                    of = float(self.queries[i])
                values[metric] = 100.0 * metrics.ratio(float(sums[i]), of)
            found[name] = {
                "metrics": values if self.pairs[i] else {},
                "labels": int(inside.sum()),
                "pairs": int(self.pairs[i]),
                "queries": int(self.queries[i]),
            }
        return found


class _OfQueries:
    """Sums over the queries of each group; those of none stand in a last row."""

    def __init__(self, groups: Groups, num_labels: int):
        self.groups = groups
        self.size = len(groups.names) + 1
        self.sums: dict[str, Float[np.ndarray, " g"]] = {}
        self.possible: dict[str, Float[np.ndarray, " g"]] = {}
        self.pairs = np.zeros(self.size, np.int64)
        self.best_rank = np.full((self.size, num_labels), metrics.NEVER, np.int32)
        self.occurs = np.zeros((self.size, num_labels), bool)

    def add(self, block: Judged) -> None:
        group = self.groups.of[block.queries] % self.size
        count = np.diff(block.true.indptr)
        self.pairs += np.bincount(group, weights=count, minlength=self.size).astype(np.int64)
        self.occurs[np.repeat(group, count), block.true.indices] = True
        for name, most in block.possible.items():
            self.possible[name] = self.possible.get(name, 0.0) + _sum_at(group, self.size, most)
        group = group[block.query]
        np.minimum.at(self.best_rank, (group, block.label), block.rank)
        for name, gains in block.gains.items():
            self.sums[name] = self.sums.get(name, 0.0) + _sum_at(group, self.size, gains)

    def finish(self, cuts: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The metrics of each group."""
        queries = np.bincount(self.groups.of % self.size, minlength=self.size)
        found = {}
        for i, name in enumerate(self.groups.names):
            if not queries[i]:
                continue
            best_rank = self.best_rank[i][self.occurs[i]]
            values = metrics.coverage(best_rank, cuts)
            for metric, sums in self.sums.items():
                of = float(self.possible.get(metric, queries)[i])
                values[metric] = 100.0 * metrics.ratio(float(sums[i]), of)
            found[name] = {
                "metrics": values,
                "labels": len(best_rank),
                "pairs": int(self.pairs[i]),
                "queries": int(queries[i]),
            }
        return found
