"""JSON files: damage of any kind is an InputError that names the file; writes are atomic."""

import json
import os

import msgspec
import pytest

from vixml_jax.errors import InputError
from vixml_jax.storage import json_files


class Point(msgspec.Struct):
    x: int
    name: str = ""


def test_other_fields_are_ignored(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"x": 3, "y": 4}')
    assert json_files.read(path, Point, "write it again") == Point(3)


@pytest.mark.parametrize("schema", [Point, dict[str, int]])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"x": "3"}',
        b'{"x": null}',
        b'{"x": 1e999}',
        b'{"\xff": 3, "name": "\xff"}',
        b'{"x":' * 99999 + b"1" + b"}" * 99999,
        b'{"y":' * 99999 + b"1" + b"}" * 99999,
    ],
)
def test_damaged_files_are_input_errors(tmp_path, schema, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        json_files.read(path, schema, "write it again")
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith("write it again")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"a\.json.*; write it again"):
        json_files.read(tmp_path / "a.json", Point, "write it again")


def test_json_round_trip_makes_directories(tmp_path):
    path = tmp_path / "deep" / "test-exact.json"
    results = {"P@1": 12.5, "search": {"kind": "exact"}, "name": "Ärger"}
    json_files.write(path, results)
    assert json.loads(path.read_text(encoding="utf-8")) == results
    json_files.write(str(path), {"P@1": 13})
    assert json.loads(path.read_text(encoding="utf-8")) == {"P@1": 13}
    assert os.listdir(path.parent) == ["test-exact.json"]


@pytest.mark.parametrize("bad,error", [(float("nan"), ValueError), (object(), TypeError)])
def test_invalid_json_value_keeps_the_old_file(bad, error, tmp_path):
    path = tmp_path / "results.json"
    json_files.write(path, {"P@1": 1})
    with pytest.raises(error):
        json_files.write(path, {"P@1": bad})
    assert json.loads(path.read_text(encoding="utf-8")) == {"P@1": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_failed_rename_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        json_files.write(tmp_path / "results.json", {"P@1": 1})
    assert os.listdir(tmp_path) == []
