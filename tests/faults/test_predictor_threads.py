"""Calls of a predictor beside refreshes: each call sees the labels of one version, all of it."""

import pathlib
import tarfile
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_1.tar.gz"
QUERIES = ["a3 b4", "b7 a1", "a9 b0"]
THREADS = 16


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / "run")


def best(predictor):
    """What a call answers: labels with their texts, and their scores."""
    found = [label for row in predictor(QUERIES, k=6) for label in row]
    return tuple((x.id, x.text) for x in found), tuple(x.score for x in found)


def is_one_of(answer, expected):
    """Whether an answer is one of those expected; calls that run together round sums otherwise."""
    return any(
        answer[0] == labels and np.allclose(answer[1], scores, atol=1e-5)
        for labels, scores in expected
    )


def check(workdir, updates, seconds):
    """Calls from many threads while steps are written and taken back; `updates` writes the steps.

    Every answer must be that of one of the versions. Labels are added at the places of queries, so
    that each version answers differently, and removed, so that rows move.
    """
    predictor = Predictor.load(workdir, warm=False)
    assert predictor.mixing is not None  # The relevance of training queries must fit, too.
    expected = {best(predictor)}
    for update in updates:
        update(predictor)
        predictor.refresh()
        expected.add(best(predictor))
    assert len({labels for labels, _ in expected}) == len(updates) + 1
    for _ in updates:
        label_updates.undo(workdir)
    predictor.refresh()
    stop, started = threading.Event(), threading.Barrier(THREADS + 1)
    answers = set()

    def ask():
        started.wait(60)
        while not stop.is_set():
            answers.add(best(predictor))

    def goes_on(start, turns):
        # On a busy machine the first calls, which compile, may outlast the time.
        few = turns < 2 or len({labels for labels, _ in answers.copy()}) < 2
        return time.monotonic() < start + (60 if few else seconds)

    with futures.ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(ask) for _ in range(THREADS)]
        try:
            started.wait(60)
            start, turns = time.monotonic(), 0
            while goes_on(start, turns):
                for update in updates:
                    update(predictor)
                    predictor.refresh()
                    time.sleep(0.01)
                for _ in updates:
                    label_updates.undo(workdir)
                    predictor.refresh()
                    time.sleep(0.01)
                turns += 1
        finally:
            stop.set()
        for one in asked:
            one.result()
    assert all(is_one_of(answer, expected) for answer in answers)
    assert len({labels for labels, _ in answers}) > 1  # Something was seen to change.


def updates_of(workdir):
    def add(predictor):
        vectors = predictor.encode(QUERIES)
        label_updates.add(workdir, predictor.artifacts, ["x", "y", "z"], QUERIES, vectors)

    def remove(predictor):
        names = [predictor.artifacts.ids[row] for row in (3, 7, 11)]
        label_updates.remove(workdir, predictor.artifacts, [*names, "y"])

    def add_again(predictor):
        vectors = predictor.encode(QUERIES)[:1]
        label_updates.add(workdir, predictor.artifacts, ["y"], ["another text"], vectors)

    return [add, remove, add_again]


def test_each_call_sees_one_version(workdir):
    check(workdir, updates_of(workdir), seconds=2.0)


@pytest.mark.slow
def test_each_call_sees_one_version_for_minutes(workdir):
    check(workdir, updates_of(workdir), seconds=60.0)


def test_refreshes_from_many_threads_end_with_the_last_version(workdir):
    predictor = Predictor.load(workdir, warm=False)
    vectors = np.eye(predictor.artifacts.vectors.shape[1], dtype=np.float32)

    def add(i):
        label_updates.add(workdir, predictor.artifacts, [f"new {i}"], ["text"], vectors[i : i + 1])
        predictor.refresh()
        assert predictor.row_of(f"new {i}") is not None

    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert {f"new {i}" for i in range(8)} <= {*predictor.updates.ids}
    assert predictor.num_labels == 28
