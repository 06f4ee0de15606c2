"""All metrics of a search per query, per group of labels and per group of queries, in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.metrics import BlockHits
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.evaluation.slices import Groups


class SlicedMetrics(NamedTuple):
    """Metrics of a search per query and per group.

    Attributes:
      queries: The terms that each query adds to each metric.
      groups: By kind of group and name of group: its `metrics` in percent and its number of
        `labels`, `queries` and true `pairs`. For a group of labels, `queries` counts those with a
        true label in it. Empty groups are left out. A group of labels without a true pair has no
        metrics.
    """

    queries: PerQuery
    groups: dict[str, dict[str, dict[str, Any]]]


def compute(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    label_groups: Mapping[str, Groups],
    query_groups: Mapping[str, Groups],
    ks: Sequence[int] = metrics.KS,
    recall_ks: Sequence[int] = metrics.RECALL_KS,
) -> SlicedMetrics:
    """Returns the metrics of each query and of each group, defined as in `metrics.compute_metrics`.

    The metrics of a group of queries are computed on these queries alone.

    P, nDCG, PSP, PSnDCG, MAP and MRR of a group of labels are sums over the hits with labels of the
    group, averaged over all queries, so that the values of the groups sum to the metric of all
    labels. R and coverage are computed as if the labels of the group were the only true ones; R is
    averaged over the queries that have one of them.

    Args:
      ids, relevance, inverse_propensity, ks, recall_ks: As in `metrics.compute_metrics`.
      label_groups: Groups of labels, by kind.
      query_groups: Groups of queries, by kind.
    """
    cuts = (*ks, *recall_ks)
    num_queries, num_labels = relevance.shape
    by_label = {kind: _LabelSums(groups) for kind, groups in label_groups.items()}
    by_query = {kind: _QuerySums(groups, num_labels) for kind, groups in query_groups.items()}
    best_rank = np.full(num_labels, metrics.NEVER, np.int32)
    occurs = np.zeros(num_labels, bool)
    columns: dict[str, np.ndarray] = {}
    for block in metrics.hits_by_block(
        ids, relevance, inverse_propensity, ks=ks, recall_ks=recall_ks
    ):
        if not columns:
            columns = {
                part: np.zeros((num_queries, len(by_metric)), np.float32)
                for part, by_metric in (("values", block.gains), ("possible", block.possible))
            }
        for column, gains in enumerate(block.gains.values()):
            columns["values"][block.queries, column] = _sum_at(
                block.query, len(columns["values"][block.queries]), gains
            )
        for column, largest in enumerate(block.possible.values()):
            columns["possible"][block.queries, column] = largest
        np.minimum.at(best_rank, block.label, block.rank)
        occurs[block.true.indices] = True
        for sums in (*by_label.values(), *by_query.values()):
            sums.add(block)
        names, ratios = tuple(block.gains), tuple(block.possible)
    queries = PerQuery(names, columns["values"], ratios, columns["possible"])
    groups = {kind: sums.finish(best_rank, occurs, cuts) for kind, sums in by_label.items()}
    groups |= {kind: sums.finish(cuts) for kind, sums in by_query.items()}
    return SlicedMetrics(queries, groups)


def _sum_at(at: Int[np.ndarray, " h"], size: int, values: Any) -> Float[np.ndarray, " size"]:
    return np.bincount(at, weights=values, minlength=size)[:size]


class _LabelSums:
    """Sums over the hits with labels of each group; the last column is for labels of no group."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self.size = len(groups.names) + 1
        self.sums: dict[str, Float[np.ndarray, " g"]] = {}
        self.possible: dict[str, float] = {}  # Over all labels.
        self.num_queries = 0
        self.pairs = np.zeros(self.size, np.int64)
        self.queries = np.zeros(self.size, np.int64)

    def add(self, block: BlockHits) -> None:
        group_ids, size = self.groups.group_ids, self.size
        num_queries = block.true.shape[0]
        self.num_queries += num_queries
        for name, largest in block.possible.items():
            self.possible[name] = self.possible.get(name, 0.0) + float(largest.sum())
        query = np.repeat(np.arange(num_queries), np.diff(block.true.indptr))
        group = group_ids[block.true.indices] % size  # -1, no group, becomes the last column.
        pairs = np.bincount(query * size + group, minlength=num_queries * size)
        pairs = pairs.reshape(num_queries, size)
        self.pairs += pairs.sum(axis=0)
        self.queries += np.count_nonzero(pairs, axis=0)
        group = group_ids[block.label] % size
        for name, gains in block.gains.items():
            if name.startswith("R@"):  # Relative to the true labels of the group, not to all.
                gains = (gains > 0) / pairs[block.query, group]
            self.sums[name] = self.sums.get(name, 0.0) + _sum_at(group, size, gains)

    def finish(
        self,
        best_rank: Int[np.ndarray, " l"],
        occurs: Bool[np.ndarray, " l"],
        cuts: Sequence[int],
    ) -> dict[str, dict[str, Any]]:
        """Returns the metrics and counts of each group.

        Args:
          best_rank: Best rank at which each label was a hit, as in `metrics.coverage`.
          occurs: Whether each label is true for some query.
          cuts: Cut-offs of coverage.
        """
        by_group = {}
        for i, name in enumerate(self.groups.names):
            inside = self.groups.group_ids == i
            if not inside.any():
                continue
            values = metrics.coverage(best_rank[inside & occurs], cuts)
            for metric, sums in self.sums.items():
                total = self.possible.get(metric, float(self.num_queries))
                if metric.startswith("R@"):
                    total = float(self.queries[i])
                values[metric] = 100.0 * metrics.ratio(float(sums[i]), total)
            by_group[name] = {
                "metrics": values if self.pairs[i] else {},
                "labels": int(inside.sum()),
                "pairs": int(self.pairs[i]),
                "queries": int(self.queries[i]),
            }
        return by_group


class _QuerySums:
    """Sums over the queries of each group; the last row is for queries of no group."""

    def __init__(self, groups: Groups, num_labels: int):
        self.groups = groups
        self.size = len(groups.names) + 1
        self.sums: dict[str, Float[np.ndarray, " g"]] = {}
        self.possible: dict[str, Float[np.ndarray, " g"]] = {}
        self.pairs = np.zeros(self.size, np.int64)
        self.best_rank = np.full((self.size, num_labels), metrics.NEVER, np.int32)
        self.occurs = np.zeros((self.size, num_labels), bool)

    def add(self, block: BlockHits) -> None:
        group = self.groups.group_ids[block.queries] % self.size
        count = np.diff(block.true.indptr)
        self.pairs += np.bincount(group, weights=count, minlength=self.size).astype(np.int64)
        self.occurs[np.repeat(group, count), block.true.indices] = True
        for name, largest in block.possible.items():
            self.possible[name] = self.possible.get(name, 0.0) + _sum_at(group, self.size, largest)
        group = group[block.query]
        np.minimum.at(self.best_rank, (group, block.label), block.rank)
        for name, gains in block.gains.items():
            self.sums[name] = self.sums.get(name, 0.0) + _sum_at(group, self.size, gains)

    def finish(self, cuts: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Returns the metrics and counts of each group, with coverage at the given cut-offs."""
        queries = np.bincount(self.groups.group_ids % self.size, minlength=self.size)
        by_group = {}
        for i, name in enumerate(self.groups.names):
            if not queries[i]:
                continue
            best_rank = self.best_rank[i][self.occurs[i]]
            values = metrics.coverage(best_rank, cuts)
            for metric, sums in self.sums.items():
                total = float(self.possible.get(metric, queries)[i])
                values[metric] = 100.0 * metrics.ratio(float(sums[i]), total)
            by_group[name] = {
                "metrics": values,
                "labels": len(best_rank),
                "pairs": int(self.pairs[i]),
                "queries": int(queries[i]),
            }
        return by_group
