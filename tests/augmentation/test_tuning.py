"""Tuning against rankings of `mix_neighbours`, one setting at a time."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax import evaluator
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import settings, tuning
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.search import index
from vixml_jax.search.fusion import Fusion
from vixml_jax.structs import SearchResult

NUM_LABELS, NUM_TRAIN, NUM_QUERIES = 60, 40, 25


def best(vectors, queries, k):
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    return SearchResult(np.take_along_axis(scores, ids, axis=1).astype(np.float32), ids)


@pytest.fixture(params=[False, True], ids=["cosines", "probabilities"])
def held_out(request, monkeypatch):
    """Queries with filter pairs: rankings of labels by fusion, and the rest of the inputs."""
    monkeypatch.setattr(tuning, "_BLOCK", 7)
    monkeypatch.setattr(mixing_lib, "_BLOCK", 11)
    rng = np.random.default_rng(0)
    train, queries = (rng.normal(size=(n, 6)) for n in (NUM_TRAIN, NUM_QUERIES))
    relevance, truth = (
        sparse.random(n, NUM_LABELS, 0.1, "csr", random_state=rng, data_rvs=np.ones)
        for n in (NUM_TRAIN, NUM_QUERIES)
    )
    never = np.stack([rng.integers(0, NUM_QUERIES, 40), rng.integers(0, NUM_LABELS, 40)], axis=1)
    found = {}
    for fusion in [Fusion(float(a), 1.0) for a in range(3)] if request.param else [None]:
        labels = best(rng.normal(size=(NUM_LABELS, 6)), queries, 30)
        if request.param:
            p = np.exp(labels.scores)
            labels = SearchResult((p / p.sum(axis=1, keepdims=True) / 2).astype("f4"), labels.ids)
        found[fusion] = index.drop_filtered(labels, never, 12)
    validation = tuning.Validation(best(train, queries, 12), truth, relevance, never, 9)
    return found, validation, request.param


def value_of(result, truth):
    weights = np.arange(1.0, NUM_LABELS + 1)
    found = metrics.compute_metrics(result.ids, truth, weights, ks=(1, 3, 5), recall_ks=(9,))
    return float(np.mean([found[name] for name in ("P@1", "PSP@3", "nDCG@5", "R@9", "MRR")]))


def values_of_rankings(labels, validation, mixings, as_probabilities):
    values = {}
    for mixing in mixings:
        mixed = mixing_lib.mix_neighbours(
            labels,
            validation.neighbours,
            validation.relevance,
            mixing,
            validation.k,
            validation.never,
            as_probabilities=as_probabilities,
        )
        values[mixing] = value_of(mixed, validation.truth)
    return values


def test_values_are_those_of_mixed_rankings(held_out):
    found, validation, as_probabilities = held_out
    mixings = mixing_lib.grid(12, joint=not as_probabilities)
    labels = next(iter(found.values()))
    tried = tuning.evaluate_all(
        labels,
        validation,
        lambda result: value_of(result, validation.truth),
        mixings,
        as_probabilities=as_probabilities,
    )
    assert list(tried) == mixings
    assert tried == values_of_rankings(labels, validation, mixings, as_probabilities)
    assert len(set(tried.values())) > len(mixings) / 20


def test_tied_labels_are_ranked_by_id():
    """Labels with equal scores, among them more than a ranking has columns."""
    labels = SearchResult(np.full((1, 6), 0.1, np.float32), np.array([[9, 4, 7, 1, 3, 8]], "i4"))
    near = SearchResult(np.zeros((1, 2), np.float32), np.array([[0, 1]], np.int32))
    relevance = sparse.csr_matrix(np.tile(np.arange(12) >= 6, (2, 1)).astype(np.float32))
    for true in range(12):
        truth = sparse.csr_matrix(([1.0], ([0], [true])), shape=(1, 12))
        validation = tuning.Validation(near, truth, relevance, np.zeros((0, 2), int), 3)
        mixings = [Mixing(weight, 2, 0.1) for weight in (0.0, 0.2, 0.9, 1.0)]
        ranks = []
        tuning.evaluate_all(
            labels,
            validation,
            lambda result, ranks=ranks: ranks.append(result.ids.tolist()) or 0.0,
            mixings,
            as_probabilities=True,
        )
        for mixing, ids in zip(mixings, ranks, strict=True):
            whole = mixing_lib.mix_neighbours(
                labels, near, relevance, mixing, 3, as_probabilities=True
            ).ids
            np.testing.assert_array_equal(ids, np.where(whole == true, whole, -1))


def test_the_best_fusion_and_mixing_are_found_in_turns(held_out):
    found, validation, as_probabilities = held_out
    mixings = mixing_lib.grid(12, joint=False)[::5]
    rows = tuning.tune(
        found, validation, lambda result: value_of(result, validation.truth), mixings
    )
    tried = {settings.from_row(row): row["value"] for row in rows}
    assert len(tried) == len(rows)
    assert list(tried.values()) == sorted(tried.values(), reverse=True)
    for scoring, value in tried.items():
        labels = found[scoring.fusion]
        if scoring.mixing is None:
            expected = value_of(SearchResult(*(x[:, :9] for x in labels)), validation.truth)
        else:
            expected = values_of_rankings(labels, validation, [scoring.mixing], as_probabilities)
            expected = expected[scoring.mixing]
        assert value == expected, scoring
    assert {Scoring(fusion) for fusion in found} <= tried.keys()
    for row in rows[:: len(rows) // 7]:
        ranking = tuning.rankings(found, validation, settings.from_row(row))
        assert value_of(ranking, validation.truth) == row["value"]
    # No other fusion is better with the best mixing, and no other mixing with the best fusion.
    winner = max((s for s in tried if s.mixing is not None), key=tried.get)
    for fusion in found:
        assert tried[Scoring(fusion, winner.mixing)] <= tried[winner]
    for mixing in mixings:
        assert tried[Scoring(winner.fusion, mixing)] <= tried[winner]


@pytest.mark.parametrize(
    "helped, lost, kept", [(30, 10, True), (30, 28, False), (9, 1, True), (2, 1, False)]
)
def test_neighbours_must_help_beyond_chance(helped, lost, kept):
    """`helped` of 200 queries gain a hit by neighbours and `lost` queries lose theirs."""
    hits = np.zeros((200, 1), np.float32)
    hits[:100] = 1.0
    mixed = hits.copy()
    mixed[:lost], mixed[100 : 100 + helped] = 0.0, 1.0
    rows = [
        settings.to_row(settings.Scoring(None, mixing), value)
        for mixing, value in (
            (Mixing(0.1, 1, 0.1), 50 + (helped - lost) / 2),
            (Mixing(0.2, 1, 0.1), 50.0),
            (None, 50.0),
        )
    ]
    values = {0.1: mixed, 0.0: hits}

    def terms(row):
        return PerQuery(("P@1",), values[row["weight"]], (), np.zeros((200, 0), np.float32))

    # The standard error of a sum of `helped` ones and `lost` minus ones, in queries.
    error = np.sqrt(helped + lost - (helped - lost) ** 2 / 200)
    assert kept == (helped - lost > 1.01 * error)
    found = evaluator.without_chance(rows, None, terms, ["P@1", "coverage@1"])
    assert found == ([rows[0], rows[2], rows[1]] if kept else [rows[2], rows[0], rows[1]])
    found = evaluator.without_chance(rows, None, terms, ["coverage@1"])
    assert found == [rows[0], rows[2], rows[1]]


@pytest.mark.parametrize(
    "of_weights,of_neighbours,expected",
    [
        (3, 30, ["mixed", "own"]),
        (30, 30, ["both", "other"]),
        (30, 2, ["other"]),
        (3, 2, ["own"]),
        (-3, 30, ["mixed", "own"]),
    ],
)
def test_other_weights_must_help_beyond_chance(of_weights, of_neighbours, expected):
    """Weights and neighbours each lose 10 of 400 queries, and gain 10 others and these numbers."""
    own, other = Fusion(10.0, 1.0), Fusion(20.0, 1.0)
    rows, hits = {}, {}
    for name, fusion, weight in (
        ("own", own, 0.0), ("other", other, 0.0), ("mixed", own, 0.1), ("both", other, 0.1),
    ):  # fmt: skip
        hits[name] = np.zeros((400, 1), np.float32)
        hits[name][:100] = 1.0
        if fusion is other:
            hits[name][:10], hits[name][100 : 110 + of_weights] = 0.0, 1.0
        if weight:
            hits[name][10:20], hits[name][200 : 210 + of_neighbours] = 0.0, 1.0
        scoring = settings.Scoring(fusion, Mixing(weight, 1, 0.1) if weight else None)
        rows[name] = settings.to_row(scoring, 100 * float(hits[name].mean()))
    name_of = {id(row): name for name, row in rows.items()}

    def terms(row):
        values = hits[name_of[id(row)]]
        return PerQuery(("P@1",), values, (), np.zeros((400, 0), np.float32))

    tried = sorted(rows.values(), key=lambda row: -row["value"])
    found = [name_of[id(row)] for row in evaluator.without_chance(tried, own, terms, ["P@1"])]
    assert found[: len(expected)] == expected
    assert sorted(found) == sorted(rows)
    assert found[len(expected) :] == [
        name_of[id(row)] for row in tried if name_of[id(row)] not in expected
    ]


def test_neighbours_that_only_tie_are_left_off():
    labels = SearchResult(np.array([[0.6, 0.3]], np.float32), np.array([[0, 1]], np.int32))
    near = SearchResult(np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32))
    relevance = truth = sparse.csr_matrix(np.array([[1.0, 0.0]], np.float32))
    validation = tuning.Validation(near, truth, relevance, np.zeros((0, 2), int), 1)
    rows = tuning.tune(
        {None: labels}, validation, lambda r: float(r.ids[0, 0] == 0), [Mixing(0.1, 1, 0.1)]
    )
    assert settings.best_of(rows) == Scoring()
