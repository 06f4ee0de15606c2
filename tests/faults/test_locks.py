"""Locks: one holder at a time, given back by the kernel, and no file is left."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from vixml_jax.errors import InputError
from vixml_jax.storage import locks

_FORK = multiprocessing.get_context("fork")


def hold(directory, ready):
    with locks.exclusive(directory, doing="training"):
        ready.set()
        time.sleep(60)


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path):
    ready = _FORK.Event()
    holder = _FORK.Process(target=hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(InputError, match=rf"in use by process {holder.pid} on .*\(training\)"):
        with locks.exclusive(str(tmp_path), doing="other"):
            raise AssertionError
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == holder.pid
    with locks.exclusive(str(tmp_path), doing="other"):
        assert json.loads((tmp_path / locks.NAME).read_text())["doing"] == "other"
    assert os.listdir(tmp_path) == []


def count(path, times):
    for _ in range(times):
        with locks.exclusive(os.path.dirname(path), doing="counting", wait_s=60):
            with open(path) as file:
                value = int(file.read())
            with open(path, "w") as file:
                file.write(str(value + 1))


def test_no_addition_of_many_processes_and_threads_is_lost(tmp_path):
    path = str(tmp_path / "number")
    (tmp_path / "number").write_text("0")
    workers = [_FORK.Process(target=count, args=(path, 25)) for _ in range(4)]
    workers += [threading.Thread(target=count, args=(path, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "number").read_text() == "200"
    assert os.listdir(tmp_path) == ["number"]


def test_a_damaged_lock_file_of_a_dead_process_is_no_obstacle(tmp_path):
    for contents in (b"", b"\xff{", b"[]", b'{"pid": 1}', b"x" * 100_000):
        (tmp_path / locks.NAME).write_bytes(contents)
        with locks.exclusive(str(tmp_path), doing="other"):
            with pytest.raises(InputError, match="in use by process"):
                with locks.exclusive(str(tmp_path), doing="other"):
                    raise AssertionError


def test_directories_that_cannot_be_written_to_are_refused(tmp_path):
    for directory in (tmp_path / "missing", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be created"):
            with locks.exclusive(str(directory), doing="other"):
                raise AssertionError
    (tmp_path / "victim").write_text("text")
    (tmp_path / locks.NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="cannot be created"):
        with locks.exclusive(str(tmp_path), doing="other"):
            raise AssertionError
    assert (tmp_path / "victim").read_text() == "text"
