"""JSON files read against a schema: damage of any kind is an InputError that names the file."""

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
