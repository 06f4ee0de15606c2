"""Atomic writes beside other writers, after killed ones, and without exchanges of names."""

import fcntl
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from vixml_jax.storage import atomic

_SPAWN = multiprocessing.get_context("fork")


def write_directory(path, value):
    with atomic.directory(path) as temporary:
        for name in "abc":
            with open(os.path.join(temporary, name), "w") as file:
                file.write(value)


def read_directory(path):
    values = set()
    for name in "abc":
        with open(os.path.join(path, name)) as file:
            values.add(file.read())
    (value,) = values
    return value


def write_many(path, name, count):
    for number in range(count):
        write_directory(path, f"{name}-{number}")


def hold(path, kind, ready):
    """Begins a write, and waits to be killed."""
    with getattr(atomic, kind)(path) as temporary:
        if kind != "file":
            open(os.path.join(temporary, "half"), "w").close()
        ready.set()
        time.sleep(60)


def test_writers_of_one_directory_never_mix_and_something_is_always_there(tmp_path):
    path = str(tmp_path / "data")
    write_directory(path, "first")
    writers = [_SPAWN.Process(target=write_many, args=(path, n, 15)) for n in range(4)]
    for writer in writers:
        writer.start()
    missing = 0
    while any(writer.is_alive() for writer in writers):
        missing += not os.path.isdir(path)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert missing == 0
    read_directory(path)
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("kind", ["file", "directory", "scratch"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, kind):
    path, ready = str(tmp_path / "data"), _SPAWN.Event()
    writer = _SPAWN.Process(target=hold, args=(path, kind, ready))
    writer.start()
    assert ready.wait(20)
    (left,) = os.listdir(tmp_path)
    atomic.recover(path)
    assert os.listdir(tmp_path) == [left]  # Its writer lives.
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with getattr(atomic, kind)(path):
        assert left not in os.listdir(tmp_path)
    assert os.listdir(tmp_path) == ([] if kind == "scratch" else ["data"])


def test_what_other_programs_name_alike_stays(tmp_path):
    names = {"data.tmp", "data-tmp-1", "other.tmp-12", "data.old", "mydata.tmp-1"}
    for name in names:
        (tmp_path / name).touch()
    atomic.write_text(tmp_path / "data", "text")
    assert set(os.listdir(tmp_path)) == names | {"data"}


def test_a_link_with_a_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (tmp_path / "data.tmp-1").symlink_to(tmp_path / "victim")
    write_directory(str(tmp_path / "data"), "x")
    assert (tmp_path / "victim" / "file").exists()


def test_without_exchange_a_killed_writer_leaves_the_earlier_version(tmp_path, monkeypatch):
    """On file systems that cannot exchange names, a kill between the two renames."""
    path = str(tmp_path / "data")
    write_directory(path, "first")
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write_directory(path, "second")
    assert read_directory(path) == "second" and os.listdir(tmp_path) == ["data"]

    rename, renames = os.rename, []

    def killed(source, target):
        renames.append(target)
        if len(renames) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    def child():
        monkeypatch.setattr(os, "rename", killed)
        write_directory(path, "third")

    writer = _SPAWN.Process(target=child)
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL and not os.path.exists(path)
    atomic.recover(path)
    assert read_directory(path) == "second" and os.listdir(tmp_path) == ["data"]


def test_temporary_names_are_random_and_created_exclusively(tmp_path, monkeypatch):
    path, tokens = str(tmp_path / "data"), iter(["taken", "free"])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: next(tokens))
    monkeypatch.setattr(atomic, "recover", lambda path: None)
    (tmp_path / "data.tmp-taken").write_text("of another process")
    with pytest.raises(FileExistsError):
        atomic.write_text(path, "text")
    assert (tmp_path / "data.tmp-taken").read_text() == "of another process"


def test_a_writer_whose_new_file_another_process_is_removing_takes_another(tmp_path, monkeypatch):
    path, flock, calls = str(tmp_path / "data"), fcntl.flock, []

    def once_held(descriptor, kind):
        calls.append(descriptor)
        if len(calls) == 1:
            raise BlockingIOError
        flock(descriptor, kind)

    monkeypatch.setattr(atomic.fcntl, "flock", once_held)
    atomic.write_text(path, "text")
    assert open(path).read() == "text" and len(calls) == 2


def test_random_contents_survive_interrupted_writers(tmp_path):
    rng = np.random.default_rng(3)
    path, expected = str(tmp_path / "data"), "first"
    write_directory(path, expected)
    for trial in range(12):
        writer = _SPAWN.Process(target=write_many, args=(path, trial, 1000))
        writer.start()
        time.sleep(float(rng.uniform(0.0, 0.06)))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = read_directory(path)
        assert found == expected or found.startswith(f"{trial}-")
        expected = found
    write_directory(path, "last")
    assert os.listdir(tmp_path) == ["data"]
