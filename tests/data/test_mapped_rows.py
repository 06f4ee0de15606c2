"""Rows of memory-mapped files: copied correctly, without pages that count as memory."""

import numpy as np
import pytest

from vixml_jax.data import mapped_rows


def mapped(tmp_path, values, name="values.npy"):
    np.save(tmp_path / name, values)
    return np.asarray(np.load(tmp_path / name, mmap_mode="r"))


def resident():
    """Bytes of mapped files that count as memory of this process."""
    with open("/proc/self/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return 1024 * int(fields["RssFile"].split()[0])


@pytest.mark.parametrize("small", [0, 1 << 28])
@pytest.mark.parametrize("shape,dtype", [((500,), np.int32), ((500, 3), np.float16)])
def test_runs_are_copied(tmp_path, monkeypatch, small, shape, dtype):
    monkeypatch.setattr(mapped_rows, "_SMALL", small)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, shape).astype(dtype)
    lengths = rng.integers(0, 6, 40)
    starts, at = rng.integers(0, 490, 40), np.cumsum(lengths) - lengths + 7
    expected = np.zeros((300, *shape[1:]), dtype)
    for start, length, place in zip(starts, lengths, at, strict=True):
        expected[place : place + length] = values[start : start + length]
    file = mapped(tmp_path, values)
    longer = mapped(tmp_path, np.concatenate([values[-5:], values]), "longer.npy")
    for source in (values, file, longer[5:]):
        copied = np.zeros_like(expected)
        mapped_rows.copy_runs(source, starts, lengths, copied, at)
        np.testing.assert_array_equal(copied, expected)


def test_truncated_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_rows, "_SMALL", 0)
    file = mapped(tmp_path, np.arange(10_000))
    with open(tmp_path / "values.npy", "r+b") as content:
        content.truncate(40_000)
    one = np.array([1])
    with pytest.raises(OSError, match=r"values\.npy: the file ends before byte"):
        mapped_rows.copy_runs(file, one * 9_000, one, np.zeros(1, np.int64), one * 0)


def test_pages_that_were_read_are_released(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_rows, "_SMALL", 0)
    file = mapped(tmp_path, np.ones(1 << 23))  # 64 MB.
    before, rows = resident(), np.arange(0, 1 << 23, 1 << 20)
    mapped_rows.copy_runs(file, rows, np.full(8, 1 << 20), np.zeros(1 << 23), rows)
    assert resident() - before < 1e7
    assert file.sum() == 1 << 23
    assert resident() - before > 5e7
    mapped_rows.release(file)
    assert resident() - before < 1e7
    mapped_rows.release(np.ones(3))  # Does nothing.
