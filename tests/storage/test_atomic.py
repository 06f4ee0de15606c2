"""Atomic writes: complete files only, and pipes and links are not replaced."""

import os
import threading

import pytest

from vixml_jax.storage import atomic


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic.file(path) as temporary:
        with open(temporary, "w") as out:
            out.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ValueError), atomic.file(path) as temporary, open(temporary, "w") as out:
        out.write("half")
        raise ValueError
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]


def test_a_pipe_stays_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    atomic.write_text(path, "text")
    reader.join(10)
    assert read == ["text"] and path.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target" / "file")
    atomic.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "file").read_text() == "text"
