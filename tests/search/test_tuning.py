"""Measurements along the frontier against the full grid, and choices against their definition."""

import itertools

import numpy as np
import pytest

from vixml_jax.search import tuning
from vixml_jax.search.tuning import Measurement


def cost(leaves, reordered):
    return 3.0 * leaves + 0.1 * reordered


def grid(rng, rows, columns):
    """Recalls that increase with either number."""
    steps = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.5)
    return np.cumsum(np.cumsum(steps, axis=0), axis=1) / (steps.sum() or 1.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("wanted", [0.2, 0.9, 1.0])
def test_finds_the_cheapest_setting_of_the_full_grid(seed, wanted):
    rng = np.random.default_rng(seed)
    leaves, reordered = tuning.steps(2, 90), tuning.steps(10, 700)
    recalls = np.minimum(grid(rng, len(leaves), len(reordered)), 1.0)
    recalls[-1, -1] = 1.0
    measured = []

    def measure(searched, candidates):
        measured.append((searched, candidates))
        recall = recalls[leaves.index(searched), reordered.index(candidates)]
        return Measurement(searched, candidates, float(recall), 1.0)

    found = tuning.frontier(measure, leaves, reordered, wanted)
    assert len(set(measured)) == len(measured) <= len(leaves) + len(reordered)
    everything = [measure(a, b) for a in leaves for b in reordered]
    enough = [setting for setting in everything if setting.recall >= wanted]
    cheapest = min(enough, key=lambda setting: (cost(*setting[:2]), setting[:2]))
    assert tuning.choose(found, wanted, cost) == cheapest


def test_chooses_the_most_recall_where_none_suffices():
    found = [Measurement(4, 10, 0.5, 1), Measurement(8, 10, 0.7, 1), Measurement(9, 10, 0.7, 9)]
    assert tuning.choose(found, 0.9, cost) == found[1]


def test_chooses_by_cost_not_by_time():
    found = [Measurement(4, 10, 0.95, 1.0), Measurement(8, 10, 0.97, 1000.0)]
    assert tuning.choose(found, 0.9, cost) == found[0]


def test_undominated_against_its_definition():
    rng = np.random.default_rng(0)
    found = [
        Measurement(int(a), int(b), round(float(r), 1), 1.0)
        for a, b, r in zip(
            rng.integers(1, 9, 60), rng.integers(1, 9, 60), rng.random(60), strict=True
        )
    ]
    best = tuning.undominated(found, cost)
    expected = {
        point.recall
        for point in found
        if not any(cost(*x[:2]) < cost(*point[:2]) and x.recall >= point.recall for x in found)
        and all(x.recall <= point.recall for x in found if cost(*x[:2]) == cost(*point[:2]))
    }
    assert [point.recall for point in best] == sorted(expected)


@pytest.mark.parametrize("least,most", [(1, 1), (1, 2), (1, 1140), (100, 6400), (7, 7)])
def test_steps_are_evenly_spaced_in_their_logarithm(least, most):
    found = tuning.steps(least, most)
    assert found[0] == least and found[-1] == most
    assert found == sorted(set(found))
    assert all(b <= max(a + 1, 1.5 * a) for a, b in itertools.pairwise(found))


def test_table_marks_the_chosen_setting():
    found = [Measurement(4, 100, 0.5, 1234.0), Measurement(1000, 200, 0.99, 20.0)]
    lines = tuning.table(found, found[1], 7).split("\n")
    assert "recall@7" in lines[0] and "queries/s" in lines[0]
    assert [line[0] for line in lines] == [" ", " ", ">"]
    assert lines[2].split() == [">", "1,000", "200", "0.9900", "20"]
