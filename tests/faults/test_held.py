"""Directories that are read while another thread replaces, moves or deletes them."""

import os
import threading
import time

import numpy as np
import pytest

from tests.training.test_checkpoints import make_state, open_checkpoints, position, write
from vixml_jax import saved_model, workdir
from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, held
from vixml_jax.training import checkpoints as checkpoints_lib

SEED = np.random.SeedSequence().entropy


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    (path / "file").write_text("content")
    return str(path)


def test_nothing_is_deleted_while_it_is_read(directory):
    with held.reading(directory) as there, held.reading(directory) as there_twice:
        assert there and there_twice
        assert not held.delete(directory)
        assert not held.delete(directory, wait_s=0.05)
        assert os.listdir(directory) == ["file"]
    assert held.delete(directory)
    assert os.listdir(os.path.dirname(directory)) == []
    with held.reading(directory) as there:
        assert not there
    assert held.delete(directory)


def test_deletion_waits_for_readers_and_then_may_be_forced(directory):
    began = time.monotonic()
    with held.reading(directory):
        assert held.delete(directory, wait_s=0.2, force=True)
        assert time.monotonic() - began >= 0.2
        assert os.listdir(os.path.dirname(directory)) == []


@pytest.mark.parametrize("change", ["delete", "move"])
def test_a_change_happens_as_soon_as_the_last_reader_has_ended(directory, change):
    entered, leave = threading.Event(), threading.Event()

    def read():
        with held.reading(directory):
            entered.set()
            leave.wait()

    reader = threading.Thread(target=read)
    reader.start()
    entered.wait()
    threading.Timer(0.2, leave.set).start()
    began = time.monotonic()
    if change == "delete":
        assert held.delete(directory, wait_s=60)
    else:
        held.move(directory, directory + "2", wait_s=60)
        assert os.listdir(directory + "2") == ["file"]
    assert 0.15 < time.monotonic() - began < 30
    reader.join()
    assert not os.path.exists(directory)


def test_a_reader_that_waits_while_it_is_deleted_finds_nothing(directory, monkeypatch):
    """The directory is deleted between its opening and the lock."""
    lock = held.fcntl.flock

    def delete_first(descriptor, kind):
        monkeypatch.setattr(held.fcntl, "flock", lock)
        assert held.delete(directory)
        lock(descriptor, kind)

    monkeypatch.setattr(held.fcntl, "flock", delete_first)
    with held.reading(directory) as there:
        assert not there


def test_two_files_are_of_one_version(tmp_path):
    """A thread replaces a directory all the time, whose two files have the same content."""
    path, over = str(tmp_path / "x"), threading.Event()
    names, rng = ("one", "other"), np.random.default_rng(SEED)

    def write_version(number):
        with atomic.directory(path) as temporary:
            for name in names:
                with open(os.path.join(temporary, name), "w") as file:
                    file.write(str(number))

    def replace():
        number = 1
        while not over.is_set():
            write_version(number)
            number += 1

    mixtures = 0

    def read():
        nonlocal mixtures
        found = []
        for name in names:
            with open(os.path.join(path, name)) as file:
                found.append(file.read())
            time.sleep(rng.uniform(0, 2e-3))
        mixtures += found[0] != found[1]
        return found

    write_version(0)
    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = set()
        for _ in range(100):
            one, other = held.one_version(path, read)
            assert one == other
            seen.add(one)
    finally:
        over.set()
        writer.join()
    assert len(seen) > 1 and mixtures, "nothing was replaced while it was read"


def test_faults_of_what_nobody_replaces_are_raised(directory):
    def fail():
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        held.one_version(directory, fail)


def test_a_checkpoint_is_read_while_its_replacement_is_written(tmp_path):
    write(tmp_path, [4])
    directory = str(tmp_path / workdir.CHECKPOINTS)
    checkpoints_lib._set_aside(directory, 4)
    with saved_model.opened(str(tmp_path)) as saved:
        assert (saved.step, saved.vectors_step, saved.is_best) == (4, 4, False)
        assert saved.path == os.path.join(f"{directory}.replaced", "4")
    checkpoints_lib._finish_replacement(directory)
    with saved_model.opened(str(tmp_path)) as saved:
        assert saved.path == os.path.join(directory, "4")


def test_training_spares_the_model_that_is_read(tmp_path):
    best = str(tmp_path / workdir.BEST)
    checkpoints = open_checkpoints(tmp_path, best=best)
    clusters = np.zeros(5, np.int32)

    def save(step):
        state = make_state(1, step, seed=step)
        checkpoints.save_best(state, state.labels)
        checkpoints.save(state, clusters, position(step, best=float(step), best_step=step))
        checkpoints.wait()
        checkpoints.drop_best_but(step)

    save(2)
    with saved_model.opened(str(tmp_path)) as saved:
        assert saved.is_best and saved.step == 2
        for step in (4, 6, 8, 10):
            save(step)
        assert sorted(os.listdir(best)) == ["10", "2"]
        assert os.listdir(saved.path)
    save(12)
    checkpoints.close()
    assert os.listdir(best) == ["12"]
