"""Pickled maps of pictures: integers are read, anything else is refused, nothing is run."""

import io
import os
import pickle
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vixml_jax.data import images, object_arrays, preparation
from vixml_jax.errors import InputError

ELEMENTS = st.one_of(
    st.integers(-1, 1 << 40),
    st.lists(st.integers(-1, 300), max_size=4),
    st.lists(st.integers(0, 9).map(np.int64), max_size=3),
    st.lists(st.integers(0, 100), max_size=4).map(lambda x: np.array(x, np.int32)),
    st.lists(st.integers(0, 100), max_size=4).map(lambda x: np.array(x, ">i8")),
)


def pack(elements, protocol=3, *, shape=None):
    """The bytes of a .npy file of objects."""
    array = np.empty(len(elements), object)
    array[:] = [*elements, None][:-1]
    file = io.BytesIO()
    head = {"descr": "|O", "fortran_order": False, "shape": shape or (len(elements),)}
    np.lib.format.write_array_header_1_0(file, head)
    pickle.dump(array, file, protocol=protocol)
    return file.getvalue()


def load(tmp_path, data):
    path = tmp_path / "map.npy"
    path.write_bytes(data)
    return object_arrays.load(str(path))


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(st.lists(ELEMENTS, max_size=6), st.integers(0, 5), st.booleans())
def test_what_numpy_writes_is_read(tmp_path_factory, elements, protocol, old):
    tmp_path = tmp_path_factory.mktemp("map")
    data = pack(elements, protocol)
    if old and protocol < 4:  # As numpy 1 names its modules; later protocols count the letters.
        data = data.replace(b"numpy._core.", b"numpy.core.")
    found = load(tmp_path, data)
    assert len(found) == len(elements)
    for one, expected in zip(found, elements, strict=True):
        np.testing.assert_array_equal(one, expected)


def test_numpys_own_file(tmp_path):
    array = np.array([[1, 2], -1, [3]], object)
    np.save(tmp_path / "map.npy", array, allow_pickle=True)
    assert object_arrays.load(str(tmp_path / "map.npy")) == [[1, 2], -1, [3]]


class Runs:
    """Is made by a call when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_malicious_file_runs_nothing(tmp_path):
    marker = tmp_path / "was_here"
    data = pack([[1], Runs(os.system, f"touch {marker}")])
    (tmp_path / "map.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"map\.npy: holds (posix|nt)\.system; expected lists"):
        object_arrays.load(str(tmp_path / "map.npy"))
    assert not marker.exists()
    program = f"import numpy; numpy.load({str(tmp_path / 'map.npy')!r}, allow_pickle=True)"
    subprocess.run([sys.executable, "-c", program], check=False)
    assert marker.exists()  # So the file does run something, where it may.


@pytest.mark.parametrize(
    "call",
    [
        (eval, "1"),
        (exec, "x = 1"),
        (open, "/etc/passwd"),
        (np.load, "/etc/passwd"),
        (np.fromfile, "/etc/passwd"),
        (np.memmap, "/etc/passwd"),
        (np.zeros, 1 << 40),
        (np.frombuffer, b"1"),
        (getattr, "a", "upper"),
        (bytearray, 1 << 40),
        (print, "here"),
        (complex, 1.0),
        (set, [1]),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_other_call_is_let_in(tmp_path, call, protocol):
    with pytest.raises(InputError, match=r"map\.npy: holds .*; expected lists of integers alone"):
        load(tmp_path, pack([[1], Runs(*call)], protocol))


@pytest.mark.parametrize(
    "element",
    [1.5, "text", b"bytes", None, True, (1, 2), {1: 2}, [1, 2.0], [[1]], [True], np.float64(1.0)],
)
def test_only_integers_are_let_in(tmp_path, element):
    with pytest.raises(InputError, match=r"map\.npy"):
        load(tmp_path, pack([[1], element]))


def raw(*parts):
    """A header of two objects, and a pickle written by hand."""
    return pack([1, 2])[: -len(pickle.dumps(np.array([1, 2], object), 3))] + b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"not a file",
        pack([1, 2])[:-3],
        pack([1, 2], shape=(3,)),
        pack([1, 2], shape=(2, 1)),
        pack([1])[:20],
        raw(pickle.dumps([1, 2])),
        raw(pickle.dumps(np.array([1, 2]))),
        raw(b"\x80\x02\x82\x01."),  # An extension code.
        raw(b"\x80\x02Pid\n."),  # A persistent id.
        raw(b"\x80\x02cnumpy\nndarray\n."),
        raw(b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb."),  # Changes what it may call.
        raw(b"\x80\x02cnumpy.core.multiarray\nscalar\n}X\x01\x00\x00\x00aK\x01sb."),
        raw(b"\x80\x02cnumpy.core.multiarray\nscalar\nN}X\x04\x00\x00\x00_runK\x01s\x86b."),
        raw(b"\x80\x02cnumpy\ndtype\nX\x03\x00\x00\x00S99K\x00K\x01\x87R."),
        raw(b"\x80\x02" + b"(" * 5000 + b"l" * 5000 + b"."),
    ],
)
def test_broken_files_are_refused(tmp_path, data):
    with pytest.raises(InputError) as caught:
        load(tmp_path, data)
    assert "map.npy" in str(caught.value) and "\n" not in str(caught.value)
    assert load(tmp_path, pack([[1], 2])) == [[1], 2]  # Nothing that it did stays.


@hypothesis.settings(max_examples=500, deadline=None, database=None)
@hypothesis.given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    tmp_path = tmp_path_factory.getbasetemp()
    whole = bytearray(
        pack([[1, 2], -1, np.array([3]), [np.int64(4)]], data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(60, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = load(tmp_path, bytes(whole))
    except InputError:
        return
    assert all(type(one) in (int, list, np.ndarray) for one in found)


def write(directory, prefix, items, vectors):
    array = np.empty(len(items), object)
    array[:] = [*items, None][:-1]
    np.save(directory / f"{prefix}_imgs_384_3_map.npy", array, allow_pickle=True)
    np.save(directory / f"{prefix}_embs_imgs_3_1152_siglip2.npy", vectors)


def test_published_pictures_are_prepared(tmp_path):
    rng = np.random.default_rng(4)
    raw, held = tmp_path / "raw", {}
    raw.mkdir()
    for prefix, count in (("trn", 30), ("tst", 12), ("lbl", 5)):
        (raw / f"{prefix}.raw.txt").write_text("".join(f"{prefix} {n}\n" for n in range(count)))
        counts = rng.integers(0, 4, count)
        rows = np.split(rng.permutation(counts.sum()), np.cumsum(counts)[:-1])
        vectors = rng.normal(size=(counts.sum(), 6)).astype(np.float32)
        items = [row.tolist() if len(row) else (rng.choice([-1, 0]) and -1) or [-1] for row in rows]
        write(raw, prefix, items, vectors)
        held[prefix] = [vectors[row].astype(np.float16) for row in rows]
        if prefix != "lbl":
            (raw / f"{prefix}_X_Y.txt").write_text(f"{count} 5\n" + "0:1 3:1\n" * count)
    source = preparation.read_source(str(raw))
    dataset = preparation.prepare(
        source, str(tmp_path / "out"), preparation.Settings(vocab_size=64)
    )
    for prefix, part in (("trn", dataset.train), ("tst", dataset.test), ("lbl", dataset.labels)):
        at = part.images.offsets
        assert len(part) == len(held[prefix])
        for row, expected in enumerate(held[prefix]):
            np.testing.assert_array_equal(part.images.values[at[row] : at[row + 1]], expected)


@pytest.mark.parametrize(
    "items,vectors,fault",
    [
        ([[0], [2]], np.zeros((2, 4)), r"item 1 \(from 0\): picture 2, expected -1 \(none\) to 1"),
        ([[0], [-2]], np.zeros((2, 4)), r"item 1 \(from 0\): picture -2"),
        ([[0]], np.zeros((2, 4)), "1 items, but there are 2 texts"),
        ([[0], [1]], np.zeros((2, 4), int), "expected floating point"),
        ([[0], [1]], np.zeros(2), "expected floating point"),
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, items, vectors, fault):
    write(tmp_path, "trn", items, vectors)
    with pytest.raises(InputError, match=fault):
        images.read_images(str(tmp_path), "trn", 2)


def test_pictures_that_are_not_finite_are_named(tmp_path):
    write(tmp_path, "trn", [[1], [0]], np.array([[1.0, np.inf], [2.0, 3.0]]))
    found = images.read_images(str(tmp_path), "trn", 2)
    with pytest.raises(InputError, match=r"row 1 \(from 0\): not finite in float16"):
        list(found.read(np.arange(2)))
    (tmp_path / "trn_imgs_384_3_map.npy").unlink()
    with pytest.raises(InputError, match=r"_map\.npy: not found, but trn_embs_imgs"):
        images.read_images(str(tmp_path), "trn", 2)
