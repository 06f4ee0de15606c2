"""The metrics benchmark on a few queries."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks import metrics
from vixml_jax.errors import InputError

SMALL = {"queries": 40, "k": 12, "labels": 50, "part": 10, "rounds": 1}


@pytest.fixture(autouse=True)
def defined_flags():
    metrics.define_flags()
    flags.FLAGS.mark_as_parsed()


def test_prints_one_table_of_programs_that_agree(capfd):
    with flagsaver.flagsaver(**SMALL):
        metrics.main([])
    printed = capfd.readouterr().out
    assert "40 queries x 12 results, 50 labels" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[2:5]] == list(metrics.PROGRAMS)
    assert "all values agree" in printed


def test_page_prints_seconds_and_memory(capfd):
    with flagsaver.flagsaver(**SMALL, page=True):
        metrics.main([])
    printed = capfd.readouterr().out
    for word in ("sliced metrics", "intervals, 1000", "per-query values", "GiB", "load"):
        assert word in printed


def test_bad_flag():
    with flagsaver.flagsaver(**SMALL | {"k": 51}), pytest.raises(InputError, match="--k=51"):
        metrics.main([])


@pytest.mark.parametrize("k,num_labels", [(5, 5), (12, 50), (100, 101)])
def test_programs_agree_and_case_is_sound(k, num_labels):
    case = metrics.random_case(200, k, num_labels, seed=k)
    assert all(len(set(row)) == k for row in case.ids)
    assert case.ids.min() >= 0 and case.ids.max() < num_labels
    assert (np.diff(case.relevance.indptr) > 0).all() and (case.relevance.data == 1).all()
    expected = metrics.ours(case)
    for program in metrics.PROGRAMS.values():
        assert program(case) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["MRR"] < 100
