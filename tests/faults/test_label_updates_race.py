"""Label updates from many threads and processes at once: none is lost, none is written twice."""

import multiprocessing
import os
import pathlib
import tarfile
from concurrent import futures

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.serving import artifacts, label_updates
from vixml_jax.serving.artifacts import ServingArtifacts

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_1.tar.gz"


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / "run")


def opened(workdir):
    return ServingArtifacts.open(artifacts.locate(workdir))


def unit(rng, width):
    vector = rng.normal(size=(1, width)).astype(np.float32)
    return vector / np.linalg.norm(vector)


def vector_of(name, width):
    return unit(np.random.default_rng([*name.encode()]), width)


def add_many(workdir, names):
    """Adds labels one by one; returns those that were added."""
    run, added = opened(workdir), []
    width = run.vectors.shape[1]
    for name in names:
        try:
            label_updates.add(workdir, run, [name], [f"text of {name}"], vector_of(name, width))
            added.append(name)
        except InputError as error:
            assert "exists already" in str(error)
    return added


def check_all_are_there(workdir, names):
    run = opened(workdir)
    width = run.vectors.shape[1]
    found = label_updates.read(workdir, run, width)
    assert sorted(set(found.ids) & set(names)) == sorted(names)
    assert len(found.ids) == len(set(found.ids))
    for name, text, vector in zip(found.ids, found.texts, found.vectors, strict=True):
        if name in names:
            assert text == f"text of {name}"
            np.testing.assert_array_equal(vector, vector_of(name, width)[0])
    directory = os.path.dirname(label_updates.steps(workdir)[0])
    left = [name for name in os.listdir(directory) if not name.isdigit() and name[0] != "."]
    assert left == []


def run_at_once(pool, workdir, lists):
    return [name for added in pool.map(add_many, [workdir] * len(lists), lists) for name in added]


def test_threads_lose_nothing_and_add_no_label_twice(workdir):
    lists = [[f"own {i} {j}" for j in range(6)] + ["shared 1", "shared 2"] for i in range(8)]
    with futures.ThreadPoolExecutor(8) as pool:
        added = run_at_once(pool, workdir, lists)
    assert len(added) == len(set(added)) == 50
    check_all_are_there(workdir, added)


def test_processes_lose_nothing(workdir):
    context = multiprocessing.get_context("spawn")  # A fork would copy the threads of JAX.
    lists = [[f"own {i} {j}" for j in range(8)] + ["shared"] for i in range(2)]
    with futures.ProcessPoolExecutor(2, context) as pool:
        added = run_at_once(pool, workdir, lists)
    assert len(added) == len(set(added)) == 17
    check_all_are_there(workdir, added)


@pytest.mark.slow
def test_many_processes_lose_nothing(workdir):
    context = multiprocessing.get_context("spawn")
    lists = [[f"own {i} {j}" for j in range(60)] + ["shared"] for i in range(6)]
    with futures.ProcessPoolExecutor(6, context) as pool:
        added = run_at_once(pool, workdir, lists)
    assert len(added) == len(set(added)) == 361
    check_all_are_there(workdir, added)


def test_reads_beside_writes_see_whole_versions(workdir):
    """Rows of removed labels never belong to others, whatever is taken back meanwhile."""
    run = opened(workdir)
    width = run.vectors.shape[1]
    rng = np.random.default_rng(7)
    before = label_updates.read(workdir, run, width)
    one, two = unit(rng, width), unit(rng, width)

    def write(turns):
        for _ in range(turns):
            label_updates.add(workdir, run, ["one"], ["first"], one)
            label_updates.add(workdir, run, ["two"], ["second"], two)
            label_updates.remove(workdir, run, ["one", run.ids[5]])
            for _ in range(3):
                label_updates.undo(workdir)

    def read(writing):
        seen = []
        while not writing.done():
            found = label_updates.read(workdir, run, width)
            seen.append((tuple(found.ids), tuple(found.removed.tolist())))
        return seen

    old, gone = tuple(before.ids), tuple(before.removed.tolist())
    first = len(run.ids) + len(old)
    expected = {
        (old, gone), ((*old, "one"), gone), ((*old, "one", "two"), gone),
        ((*old, "one", "two"), (*gone, first, 5)),
    }  # fmt: skip
    with futures.ThreadPoolExecutor(5) as pool:
        writing = pool.submit(write, 40)
        reading = [pool.submit(read, writing) for _ in range(4)]
        seen = {version for one in reading for version in one.result()}
        writing.result()
    assert seen <= expected


def test_all_labels_cannot_be_removed_by_two(workdir):
    run = opened(workdir)
    rows = [*run.ids]
    gone = label_updates.read(workdir, run, run.vectors.shape[1])
    live = [name for row, name in enumerate(rows) if row not in gone.removed] + gone.ids
    label_updates.remove(workdir, run, live[: len(live) // 2])
    with pytest.raises(InputError, match="keep at least one"):
        label_updates.remove(workdir, run, live[len(live) // 2 :])
    with pytest.raises(InputError, match="has no label"):
        label_updates.remove(workdir, run, live[:1])


def test_a_run_of_another_step_takes_no_update(workdir):
    run = opened(workdir)
    about = pathlib.Path(run.path, "answers.json")
    text = about.read_text()
    about.write_text(text.replace('"step": ', '"step": 9'))
    with pytest.raises(InputError, match="repeat the update for the new model"):
        label_updates.add(workdir, run, ["x"], ["x"], unit(np.random.default_rng(), 16))
