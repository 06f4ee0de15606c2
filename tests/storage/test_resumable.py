"""Parts of a file that go on where a process was killed, whatever it left and however much."""

import fcntl
import tracemalloc

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.storage import resumable
from vixml_jax.storage.resumable import Place


class Killed(BaseException):
    pass


def start(place, content):
    """Leaves an unfinished part with some content."""
    with pytest.raises(Killed), resumable.writing(place, "same") as part:
        part.file.write(content)
        raise Killed


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("lines,rest", [([], b""), ([], b"ha"), (["a", "", "long line"], b""),
                                        (["ä"], b"\xc3"), (["x"] * 7, b"half")])  # fmt: skip
def test_complete_lines_are_kept_and_added_to(tmp_path, monkeypatch, lines, rest, block):
    monkeypatch.setattr(resumable, "_BLOCK", block)
    place, whole = Place(str(tmp_path / "out")), "".join(f"{line}\n" for line in lines).encode()
    start(place, whole + rest)
    with resumable.writing(place, "same") as part:
        assert part.num_kept == len(lines)
        kept = part.kept()
        part.file.write(b"new\n")  # Before the others are read.
        part.file.flush()
        assert b"".join(kept) == whole
    assert (tmp_path / "out").read_bytes() == whole + b"new\n"
    assert resumable.finished(place, "same").lines == len(lines) + 1
    with resumable.writing(place, "other") as part:
        assert part.num_kept == 0 and [*part.kept()] == []


def test_memory_does_not_grow_with_what_was_written(tmp_path):
    place, count = Place(str(tmp_path / "out")), 100_000
    lengths = np.random.default_rng().integers(1, 400, count)
    start(place, b"".join(b"x" * n + b"\n" for n in lengths.tolist()))  # About 20 MB.
    tracemalloc.start()
    try:
        with resumable.writing(place, "same") as part:
            assert [part.num_kept] == [count]
            assert sum(map(len, part.kept())) == lengths.sum() + count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


def test_a_part_that_another_process_finishes_meanwhile_stays(tmp_path, monkeypatch):
    place, lock = Place(str(tmp_path / "p")), fcntl.flock

    def finished_meanwhile(file, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        with resumable.writing(place, "of") as unfinished:
            unfinished.file.write(b"a line\n")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with pytest.raises(InputError, match="another process has just finished it"):
        with resumable.writing(place, "of something else"):
            pass
    assert (tmp_path / "p").read_bytes() == b"a line\n"
    assert resumable.finished(place, "of").lines == 1
