"""Vectors kept once: only intact ones of the same step and data are used, whatever happens."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from vixml_jax.errors import NotFiniteError
from vixml_jax.storage import json_files, vector_store
from vixml_jax.storage.vector_store import VectorStore


def vectors(rows=50, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def never():
    raise AssertionError("made anew")


@pytest.fixture
def stored(tmp_path):
    """A run directory whose store has 'train' and 'labels' of step 7."""
    store = VectorStore(str(tmp_path), 7, "hash")
    store.put("train", vectors())
    store.put("labels", vectors(20, seed=1))
    return tmp_path


def files(workdir):
    return sorted(os.listdir(workdir / "vectors"))


def test_what_was_stored_is_mapped_by_later_instances(stored):
    store = VectorStore(str(stored), 7, "hash")
    for name, expected in (("train", vectors()), ("labels", vectors(20, seed=1))):
        found = store.get_or_make(name, never, *expected.shape)
        assert isinstance(found, np.memmap) and not found.flags.writeable
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.load(stored / "vectors" / f"{name}.npy"), expected)
    assert store.get("test") is None
    assert files(stored) == ["about.json", "labels.npy", "lock", "train.npy"]


def test_put_returns_what_get_returns(tmp_path):
    store = VectorStore(str(tmp_path), 7, "hash")
    values = vectors()[::2]  # Not contiguous.
    put = store.put("train", values)
    assert isinstance(put, np.memmap)
    np.testing.assert_array_equal(put, values)
    np.testing.assert_array_equal(store.get("train"), values)
    replaced = store.put("train", vectors(3))
    np.testing.assert_array_equal(store.get("train"), vectors(3))
    np.testing.assert_array_equal(replaced, vectors(3))
    np.testing.assert_array_equal(put, values)  # A mapping outlives its file.


@pytest.mark.parametrize("rows", [0, 1])
def test_arrays_of_few_rows(tmp_path, rows):
    VectorStore(str(tmp_path), 7, "hash").put("valid", vectors(rows))
    found = VectorStore(str(tmp_path), 7, "hash").get_or_make("valid", never, rows, 8)
    np.testing.assert_array_equal(found, vectors(rows))


def test_values_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_store, "_BLOCK_BYTES", 96)  # Three rows.
    VectorStore(str(tmp_path), 7, "hash").put("train", vectors())
    np.testing.assert_array_equal(VectorStore(str(tmp_path), 7, "hash").get("train"), vectors())


@pytest.mark.parametrize("step,content_hash", [(8, "hash"), (7, "other data")])
def test_another_step_or_other_data_replace_all_arrays(stored, step, content_hash, capsys):
    store = VectorStore(str(stored), step, content_hash)
    assert store.get("train") is None and store.get("labels") is None
    assert "train.npy" in files(stored)  # Reading removes nothing.
    store.get_or_make("train", lambda: vectors(seed=2), 50, 8)
    assert files(stored) == ["about.json", "lock", "train.npy"]
    assert VectorStore(str(stored), 7, "hash").get("train") is None
    np.testing.assert_array_equal(
        VectorStore(str(stored), step, content_hash).get("train"), vectors(seed=2)
    )
    assert capsys.readouterr().out == ""  # Nothing to warn of.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_the_header(path):
    path.write_bytes(b"no array" + path.read_bytes()[8:])


def change_the_dtype(path):
    np.save(path, np.load(path).astype(np.float64))


def change_the_shape(path):
    np.save(path, np.load(path).reshape(-1, 4))


DAMAGE = {
    truncate: "truncated or damaged",
    flip_a_bit: "wrong checksum",
    damage_the_header: "truncated or damaged",
    change_the_dtype: "found .*f8.*expected",
    change_the_shape: "found .*4.*expected",
    pathlib.Path.unlink: "missing",
    lambda path: path.write_bytes(b""): "truncated or damaged",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_never_used(stored, damage, capsys):
    path = stored / "vectors" / "train.npy"
    VectorStore(str(stored), 7, "hash").get("train")  # Verified once, before the damage.
    time.sleep(0.01)  # Longer than the clock of the file system takes to tick.
    damage(path)
    store = VectorStore(str(stored), 7, "hash")
    made = store.get_or_make("train", lambda: vectors(seed=3), 50, 8)
    np.testing.assert_array_equal(made, vectors(seed=3))
    (line,) = capsys.readouterr().out.splitlines()
    np.testing.assert_array_equal(store.get("labels"), vectors(20, seed=1))  # As it was.
    np.testing.assert_array_equal(VectorStore(str(stored), 7, "hash").get("train"), vectors(seed=3))
    assert line.startswith(f"warning: {path}: ") and line.endswith("made anew")
    assert re.search(DAMAGE[damage], line)


def test_values_that_are_not_finite_are_not_used(stored, capsys):
    values = vectors()
    values[3, 4] = np.nan
    np.save(stored / "vectors" / "train.npy", values)
    about = json.loads((stored / "vectors" / "about.json").read_text())
    about["arrays"]["train"]["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    json_files.write(stored / "vectors" / "about.json", about)
    assert VectorStore(str(stored), 7, "hash").get("train") is None
    assert "train.npy: some values are not finite; made anew" in capsys.readouterr().out
    with pytest.raises(NotFiniteError, match="vectors of train at step 7"):
        VectorStore(str(stored), 7, "hash").put("train", values)
    assert VectorStore(str(stored), 7, "hash").get("labels") is not None


@pytest.mark.parametrize("content", [b"", b"{", b'{"step": 7}', b"[]"])
def test_a_damaged_description_makes_all_anew(stored, content, capsys):
    path = stored / "vectors" / "about.json"
    path.write_bytes(content)
    store = VectorStore(str(stored), 7, "hash")
    assert store.get("train") is None
    assert f"warning: {path}: " in capsys.readouterr().out
    store.put("train", vectors(seed=4))
    np.testing.assert_array_equal(store.get("train"), vectors(seed=4))
    assert files(stored) == ["about.json", "lock", "train.npy"]


def test_another_shape_than_expected_is_made_anew(stored, capsys):
    store = VectorStore(str(stored), 7, "hash")
    made = store.get_or_make("train", lambda: vectors(51), 51, 8)
    np.testing.assert_array_equal(made, vectors(51))
    assert "train.npy: found shape (50, 8), expected (51, 8); made anew" in capsys.readouterr().out


def test_an_array_is_verified_once_per_process(stored, monkeypatch):
    VectorStore(str(stored), 7, "hash").get("train")

    def fail(*_):
        raise AssertionError("hashed again")

    monkeypatch.setattr(vector_store.hashlib, "sha256", fail)
    assert VectorStore(str(stored), 7, "hash").get("train") is not None


@pytest.mark.parametrize("place", ["object store", "several processes"])
def test_without_a_place_vectors_are_kept_in_memory(tmp_path, place):
    if place == "object store":
        store = VectorStore("gs://bucket/run", 7, "hash")
    else:
        store = VectorStore(str(tmp_path), 7, "hash", num_processes=2)
    assert store.get("train") is None
    made = store.get_or_make("train", vectors, 50, 8)
    np.testing.assert_array_equal(made, vectors())
    assert store.get_or_make("train", never, 50, 8) is made
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_work_goes_on(stored, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    store = VectorStore(str(stored), 7, "hash")
    monkeypatch.setattr(vector_store.np.lib.format, "write_array_header_1_0", fail)
    np.testing.assert_array_equal(store.put("train", vectors(9)), vectors(9))
    np.testing.assert_array_equal(store.put("test", vectors(5)), vectors(5))
    np.testing.assert_array_equal(store.get("train"), vectors(9))
    (line,) = capsys.readouterr().out.splitlines()
    assert "train.npy: cannot be stored (No space left on device)" in line
    monkeypatch.undo()
    later = VectorStore(str(stored), 7, "hash")
    assert later.get("train") is None  # The former one is no longer valid.
    np.testing.assert_array_equal(later.get("labels"), vectors(20, seed=1))
    assert not [file for file in files(stored) if "tmp" in file]


def test_a_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "vectors").write_text("a file in its place")
    store = VectorStore(str(tmp_path), 7, "hash")
    np.testing.assert_array_equal(store.get_or_make("train", vectors, 50, 8), vectors())
    assert "cannot be stored" in capsys.readouterr().out


def test_a_read_only_store_is_read(stored, capsys):
    if os.getuid() == 0:
        command = ["unshare", "-m", "true"]
        if not shutil.which("unshare") or subprocess.run(command, check=False).returncode:
            pytest.skip("root may write everywhere, and this machine has no mount namespaces")
        script = (
            "import sys; from vixml_jax.storage.vector_store import VectorStore as S\n"
            "s = S(sys.argv[1], 7, 'hash'); print(s.get('train').shape)\n"
            "print(s.put('test', s.get('train')).shape, s.get('test').shape)"
        )
        where = str(stored)
        mount = f'mount --bind -o ro {where} {where} && exec {sys.executable} -c "$1" {where}'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", mount, "sh", script],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "mount:" in done.stderr:
            pytest.skip(f"no read-only mount: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        first, warning, last = done.stdout.splitlines()
        assert first == "(50, 8)" and last == "(50, 8) (50, 8)"
        assert "test.npy: cannot be stored" in warning
        return
    (stored / "vectors").chmod(0o500)
    store = VectorStore(str(stored), 7, "hash")
    np.testing.assert_array_equal(store.get("train"), vectors())
    np.testing.assert_array_equal(store.put("test", vectors(5)), vectors(5))
    assert "test.npy: cannot be stored" in capsys.readouterr().out
    (stored / "vectors").chmod(0o700)


def test_what_a_killed_process_left_is_removed(stored):
    (stored / "vectors" / "test.npy.tmp-4711").write_bytes(b"half")
    (stored / "vectors" / "about.json.tmp-4711").write_bytes(b"half")
    np.save(stored / "vectors" / "test.npy", vectors(3))  # Renamed, but not yet listed.
    store = VectorStore(str(stored), 7, "hash")
    assert store.get("test") is None
    store.put("valid", vectors(4))
    assert files(stored) == ["about.json", "labels.npy", "lock", "train.npy", "valid.npy"]
    np.testing.assert_array_equal(store.get("train"), vectors())


WRITER = """
import sys, numpy as np
from vixml_jax.storage.vector_store import VectorStore
workdir, name, seed = sys.argv[1:]
values = np.random.default_rng(int(seed)).normal(size=(2000, 16)).astype(np.float32)
for _ in range(15):
    store = VectorStore(workdir, 7, "hash")
    np.testing.assert_array_equal(store.put(name, values), values)
    other = store.get("train")
    assert other is None or abs(other).sum() > 0
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    names = ["train", "train", "test", "labels"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name, str(len(name))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == ""  # No array was found damaged or half written.
    store = VectorStore(str(tmp_path), 7, "hash")
    for name in set(names):
        expected = np.random.default_rng(len(name)).normal(size=(2000, 16)).astype(np.float32)
        np.testing.assert_array_equal(store.get(name), expected)
    assert files(tmp_path) == ["about.json", "labels.npy", "lock", "test.npy", "train.npy"]


def test_a_process_killed_while_writing_leaves_the_others_intact(stored):
    script = (
        "import os, sys, numpy as np\n"
        "from vixml_jax.storage import vector_store\n"
        "replace = os.replace\n"
        "def kill(source, to):\n"
        "    replace(source, to)\n"
        "    if to.endswith('train.npy'): os.kill(os.getpid(), 9)\n"
        "os.replace = kill\n"
        "vector_store.VectorStore(sys.argv[1], 7, 'hash').put('train', np.ones((50, 8)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(stored)], check=False)
    assert done.returncode == -9
    store = VectorStore(str(stored), 7, "hash")
    assert store.get("train") is None  # Neither the new one nor the old one is listed.
    np.testing.assert_array_equal(store.get("labels"), vectors(20, seed=1))
    np.testing.assert_array_equal(store.put("train", vectors()), vectors())
