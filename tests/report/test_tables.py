"""Text tables and JSON files of results."""

import json
import os

import pytest

from vixml_jax.report import tables


def test_table_is_aligned():
    rows = {
        "kNN, text": {"P@1": 42.0, "R@100": 100.0},
        "ours": {"P@1": 58.128, "MRR": 3.0, "R@100": 81.25, "seconds": 1.0},
    }
    assert tables.format_table(rows, ("P@1", "P@3", "R@100", "MRR")) == (
        "             P@1   R@100   MRR\n"
        "------------------------------\n"
        "kNN, text  42.00  100.00     -\n"
        "ours       58.13   81.25  3.00"
    )


def test_table_without_rows_is_an_empty_header():
    assert tables.format_table({}, ("P@1",)) == "\n"


def test_json_round_trip_makes_directories(tmp_path):
    path = tmp_path / "deep" / "test-exact.json"
    results = {"P@1": 12.5, "search": {"kind": "exact"}, "name": "Ärger"}
    tables.write_json(path, results)
    assert json.loads(path.read_text(encoding="utf-8")) == results
    tables.write_json(str(path), {"P@1": 13})
    assert json.loads(path.read_text(encoding="utf-8")) == {"P@1": 13}
    assert os.listdir(path.parent) == ["test-exact.json"]


@pytest.mark.parametrize("bad,error", [(float("nan"), ValueError), (object(), TypeError)])
def test_invalid_json_value_keeps_the_old_file(bad, error, tmp_path):
    path = tmp_path / "results.json"
    tables.write_json(path, {"P@1": 1})
    with pytest.raises(error):
        tables.write_json(path, {"P@1": bad})
    assert json.loads(path.read_text(encoding="utf-8")) == {"P@1": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_failed_rename_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tables.write_json(tmp_path / "results.json", {"P@1": 1})
    assert os.listdir(tmp_path) == []
