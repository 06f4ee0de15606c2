"""Tests of the XML repository's layout: contents, and errors that name file and line."""

import os
import re

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data.sources import xml_repository
from vixml_jax.errors import InputError
from vixml_jax.storage import text_files

LINES = {
    "trn.raw.txt": ["red car", "blue car", "a green house"],
    "tst.raw.txt": ["green car", ""],
    "lbl.raw.txt": ["car", "house", "red", "Grün"],
    "trn_X_Y.txt": ["3 4", "0:1 2:1", "0:1", "1:1 3:1"],
    "tst_X_Y.txt": ["2 4", "0:1", ""],
    "filter_labels_test.txt": ["1 2", "0 3"],
}


def write_source(directory, **changed):
    """Writes a small source; `changed` replaces the lines of a file, or omits it if None."""
    directory.mkdir(exist_ok=True)
    names = {re.sub(r"\W", "_", name): name for name in LINES}
    for key, name in names.items():
        lines = changed.get(key, LINES[name])
        if lines is not None:
            text = "".join(f"{line}\n" for line in lines)
            (directory / name).write_bytes(text.encode("utf-8"))
    return str(directory)


def refused(path, reader=xml_repository.read_relevance, **options):
    with pytest.raises(InputError) as caught:
        reader(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_contents_of_a_source(tmp_path):
    raw = xml_repository.read_xml_repository(write_source(tmp_path / "cars"))
    assert raw.name == "cars"
    assert list(raw.labels.read_texts()) == [LINES["lbl.raw.txt"]]
    assert list(raw.labels.read_texts()) == [LINES["lbl.raw.txt"]]  # Can be read more than once.
    assert list(raw.test.items.read_texts()) == [["green car", ""]]
    np.testing.assert_array_equal(
        raw.train.relevance.toarray(), [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]]
    )
    np.testing.assert_array_equal(raw.test.relevance.toarray(), [[1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(raw.test.filter, [[0, 3], [1, 2]])
    assert raw.train.filter is None
    assert raw.train.items.images is None


@pytest.mark.parametrize("block", [7, 64, 1 << 22])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_relevance_with_any_block_size(tmp_path, monkeypatch, block, seed):
    monkeypatch.setattr(xml_repository, "_BLOCK", block)
    rng = np.random.default_rng(seed)
    expected = rng.random((50, 1234)) < 0.01
    rows = []
    for row in expected:
        labels = rng.permutation(np.flatnonzero(row))
        tokens = [f"{label}:{rng.choice(['1', '1.0', '1.', '1.000000'])}" for label in labels]
        rows.append(
            str(rng.choice([" ", "\t", "  "])).join(tokens) + str(rng.choice(["", " ", "\r"]))
        )
    path = tmp_path / "trn_X_Y.txt"
    path.write_bytes(("50 1234\n" + "\n".join(rows) + "\n").encode())
    found = xml_repository.read_relevance(str(path))
    np.testing.assert_array_equal(found.toarray(), expected.astype(np.float32))
    assert found.dtype == np.float32
    found.has_sorted_indices = False  # Indexing below must not rely on this property.
    assert all(np.all(np.diff(row.indices) > 0) for row in found)


@pytest.mark.parametrize(
    "row,expected",
    [
        ("0:1 4:1", "label of '4:1' is out of range, expected 0 to 3"),
        ("1:1 2:1 1:1", "duplicate label '1:1'"),
        ("2:1 2:1", "duplicate label '2:1'"),
        ("2", "found '2', expected label:1"),
        ("2:1:1", "found '2:1:1', expected label:1"),
        ("1:1 :1", "found ':1', expected label:1"),
        ("-1:1", "found '-1:1', expected label:1"),
        ("1.5:1", "found '1.5:1', expected label:1"),
        ("99999999999999999999:1", "expected label:1"),
        ("1:0", "expected the value 1"),
        ("1:", "expected the value 1"),
        ("1:0.5", "expected the value 1"),
        ("1:10", "expected the value 1"),
        ("1:1.01", "expected the value 1"),
        ("1:1x", "expected the value 1"),
        ("1 :1", "found '1', expected label:1"),
    ],
)
@pytest.mark.parametrize("block", [16, 1 << 22])
def test_invalid_rows_are_refused(tmp_path, monkeypatch, row, expected, block):
    monkeypatch.setattr(xml_repository, "_BLOCK", block)
    path = tmp_path / "trn_X_Y.txt"
    path.write_text(f"4 4\n0:1 1:1\n\n{row}\n3:1\n")
    message = refused(path)
    assert message.startswith(f"{path}, line 4: ")
    assert expected in message


@pytest.mark.parametrize(
    "text,expected",
    [
        ("", "line 1: found '', expected a header"),
        ("queries labels\n", "line 1: found 'queries labels', expected a header"),
        ("0:1 1:1\n", "expected a header"),
        ("0 4\n", "line 1: 0 queries, 4 labels; expected at least one"),
        ("2 0\n\n\n", "line 1: 2 queries, 0 labels; expected at least one"),
        ("3 4\n0:1\n1:1\n", "the header declares 3 rows, found 2"),
        ("3 4\n", "the header declares 3 rows, found 0"),
        ("1 4\n0:1\n1:1\n", "the header declares 1 rows, found 2"),
    ],
)
def test_header_must_match_the_rows(tmp_path, text, expected):
    path = tmp_path / "trn_X_Y.txt"
    path.write_text(text)
    assert expected in refused(path)


def test_only_newlines_end_a_text(tmp_path, monkeypatch):
    texts = ["one two", "", "tab\there", "form\x0cfeed\x85 ", "ein Wörtchen", "carriage"]
    path = tmp_path / "trn.raw.txt"
    path.write_bytes(b"\xef\xbb\xbf" + ("\n".join(texts[:-1]) + "\r\ncarriage").encode("utf-8"))
    for block in (1, 8, 1 << 22):
        monkeypatch.setattr(xml_repository, "_BLOCK", block)
        chunks = xml_repository.read_texts(str(path))
        assert [text for chunk in chunks for text in chunk] == texts
        assert xml_repository.count_lines(str(path)) == len(texts)
    monkeypatch.setattr(xml_repository, "_CHUNK", 4)
    assert [len(chunk) for chunk in xml_repository.read_texts(str(path))] == [4, 1, 1]


def test_latin_1_is_suggested_and_read(tmp_path):
    path = tmp_path / "trn.raw.txt"
    path.write_bytes("plain\nGrün\n".encode("latin-1"))
    message = refused(path, lambda path: list(xml_repository.read_texts(path)))
    assert message.startswith(f"{path}, line 2: byte 0xfc at column 3 is not utf-8")
    assert "--encoding=latin-1" in message
    assert list(xml_repository.read_texts(str(path), encoding="latin-1")) == [["plain", "Grün"]]


@pytest.mark.parametrize("name", ["trn.raw.txt", "tst.raw.txt", "lbl.raw.txt", "tst_X_Y.txt"])
def test_missing_files_are_refused(tmp_path, name):
    source = write_source(tmp_path / "cars", **{re.sub(r"\W", "_", name): None})
    assert f"{source}/{name}: not found" in refused(source, xml_repository.read_xml_repository)


@pytest.mark.parametrize(
    "name,lines,expected",
    [
        ("trn_raw_txt", ["one", "two"], "trn.raw.txt: 2 lines, but trn_X_Y.txt has 3 rows"),
        ("tst_raw_txt", ["1", "2", "3"], "tst.raw.txt: 3 lines, but tst_X_Y.txt"),
        ("lbl_raw_txt", ["1", "2", "3"], "lbl.raw.txt: 3 lines, but trn_X_Y.txt"),
        ("tst_X_Y_txt", ["2 5", "0:1", ""], "tst_X_Y.txt: 5 labels, but trn_X_Y.txt has 4"),
        ("filter_labels_test_txt", ["0 1", "0 4"], "line 2: pair (0, 4) is out of range"),
        ("filter_labels_test_txt", ["2 0"], "line 1: pair (2, 0) is out of range"),
        ("filter_labels_test_txt", ["0 1", "1 1", "0 1"], "line 3: duplicate pair (0, 1)"),
        ("filter_labels_test_txt", ["0 1", "1"], "line 2: found '1', expected 'query label'"),
        ("filter_labels_test_txt", ["0 1 2"], "line 1: found '0 1 2', expected 'query label'"),
        ("filter_labels_test_txt", ["0 1", "0 -1"], "line 2: found '0 -1', expected"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, name, lines, expected):
    source = write_source(tmp_path / "cars", **{name: lines})
    assert expected in refused(source, xml_repository.read_xml_repository)


def test_one_filter_pair_and_blank_lines(tmp_path):
    source = write_source(tmp_path / "cars", filter_labels_test_txt=["", "1 0", ""])
    raw = xml_repository.read_xml_repository(source)
    np.testing.assert_array_equal(raw.test.filter, [[1, 0]])


def test_npz_relevance_and_file_names_of_pecos(tmp_path):
    source = write_source(tmp_path / "cars")
    for old, new in (
        ("trn.raw.txt", "X.trn.txt"),
        ("tst.raw.txt", "X.tst.txt"),
        ("lbl.raw.txt", "output-items.txt"),
    ):
        os.rename(os.path.join(source, old), os.path.join(source, new))
    rng = np.random.default_rng(3)
    expected = {"trn": rng.random((3, 4)) < 0.5, "tst": rng.random((2, 4)) < 0.5}
    for prefix, dense in expected.items():
        os.remove(os.path.join(source, f"{prefix}_X_Y.txt"))
        values = sparse.csr_matrix(dense * rng.uniform(0.5, 2.0, dense.shape))
        sparse.save_npz(os.path.join(source, f"Y.{prefix}.npz"), values)
    assert xml_repository.is_xml_repository(source)
    raw = xml_repository.read_xml_repository(source)
    for prefix, found in (("trn", raw.train), ("tst", raw.test)):
        np.testing.assert_array_equal(found.relevance.toarray(), expected[prefix])
        assert found.relevance.dtype == np.float32
    assert list(raw.labels.read_texts()) == [LINES["lbl.raw.txt"]]


@pytest.mark.parametrize(
    "matrix,expected",
    [
        (sparse.csr_matrix([[1.0, np.nan]]), "negative or infinite values"),
        (sparse.csr_matrix([[1.0, -1.0]]), "negative or infinite values"),
        (sparse.csr_matrix((0, 3)), "expected at least one query and one label"),
        (None, "not a SciPy sparse matrix"),
    ],
)
def test_invalid_npz_relevance_is_refused(tmp_path, matrix, expected):
    path = tmp_path / "trn_X_Y.npz"
    if matrix is None:
        np.savez(path, data=np.array([{}], object))  # Could only be read with pickle.
    else:
        sparse.save_npz(path, matrix)
    assert expected in refused(path)


@pytest.mark.parametrize(
    "changed,expected",
    [
        ({"indices": [0, 10**8]}, "indices must be < 2"),
        ({"indices": [0, -5]}, "indices must be >= 0"),
        ({"indptr": [0, 10**7, 2]}, "non-decreasing"),
        ({"format": b"csc", "indices": [0, 10**8]}, "indices must be < 2"),
        ({"data": ["a", "b"]}, "expected numbers"),
        ({"data": [1j, 1j]}, "values of type complex128; expected numbers"),
    ],
)  # fmt: skip
def test_npz_relevance_with_indices_out_of_range_is_refused(tmp_path, changed, expected):
    valid = {
        "format": b"csr", "shape": [2, 2], "data": [1.0, 1.0],
        "indices": [0, 1], "indptr": [0, 1, 2],
    }  # fmt: skip
    np.savez(tmp_path / "trn_X_Y.npz", **valid)
    assert xml_repository.read_relevance(str(tmp_path / "trn_X_Y.npz")).toarray().tolist() == [
        [1, 0],
        [0, 1],
    ]
    np.savez(tmp_path / "trn_X_Y.npz", **(valid | changed))
    assert expected in refused(tmp_path / "trn_X_Y.npz")


@pytest.mark.parametrize("block", [1 << 16, 1 << 22])
@pytest.mark.parametrize("name", ["trn.raw.txt", "trn_X_Y.txt"])
def test_too_long_lines_are_refused(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(xml_repository, "_BLOCK", block)
    longest = "a" * text_files.MAX_LINE
    (tmp_path / name).write_text(f"1 1\n{longest}\nb\n")
    texts = [text for chunk in xml_repository.read_texts(str(tmp_path / name)) for text in chunk]
    assert texts == ["1 1", longest, "b"]
    (tmp_path / name).write_text(f"1 1\n{longest}a\nb\n")
    reader = xml_repository.read_relevance if "_X_Y" in name else xml_repository.count_lines
    assert f"{name}, line 2: longer than 4 MiB" in refused(tmp_path / name, reader)


def test_validation_split_of_the_source(tmp_path):
    source = write_source(tmp_path / "cars")
    (tmp_path / "cars" / "val.raw.txt").write_text("red house\n")
    (tmp_path / "cars" / "val_X_Y.txt").write_text("1 4\n1:1 2:1\n")
    raw = xml_repository.read_xml_repository(source)
    assert [list(chunk) for chunk in raw.valid.items.read_texts()] == [["red house"]]
    assert raw.valid.relevance.toarray().tolist() == [[0, 1, 1, 0]]
    assert raw.valid.filter is None


def test_directory_with_json_files_is_read_as_tables(tmp_path):
    (tmp_path / "trn_X_Y.txt").touch()
    assert xml_repository.is_xml_repository(str(tmp_path))
    (tmp_path / "trn.json.gz").touch()
    assert not xml_repository.is_xml_repository(str(tmp_path))
