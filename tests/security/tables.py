"""Tables for tests: small data sets in every format, and random damage to their files."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile

from tests.data.sources import random_tables, test_broken_input
from tests.security import model_directories, mutations, test_tampered_run
from vixml_jax.data import store

KINDS = ("csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.zst", "xml")
_JUNK = (b'"', b"\n", b",", b"\t", b"\xff\xfe", b"\x00", b"NaN", b"[" * 1000, b"}", b"\r",
         b"\xed\xa0", b"9" * 400, b"-1", b"1e999", b'{"a":' * 1000, b"x" * 10**5)  # fmt: skip


def make(root):
    """Writes a data set in each format below `root`."""
    held = random_tables.draw(7, train=12, test=6, labels=5)
    for kind in KINDS:
        if kind == "xml":
            random_tables.write_xml(held, root / kind)
        else:
            random_tables.write_tables(held, root / kind, kind)


class Target:
    """Sources of all formats, of which a file is damaged at a time."""

    def __init__(self, root):
        self._root = root
        with tempfile.TemporaryDirectory() as above:
            for kind in KINDS:
                assert _prepare(root / kind, kind, above) is None

    def attack(self, rng):
        """Damages a file of a source and prepares it; see `worker`."""
        kind = KINDS[rng.integers(len(KINDS))]
        with tempfile.TemporaryDirectory() as above:
            source = pathlib.Path(shutil.copytree(self._root / kind, f"{above}/{kind}"))
            files = [path for path in sorted(source.iterdir()) if path.stat().st_size]
            path = files[rng.integers(len(files))]
            print(f"{kind}/{path.name}: {_mutate(rng, path)}", end=" ", flush=True)
            os.mkdir(f"{above}/out")
            line = _prepare(source, kind, f"{above}/out")
            left = os.listdir(f"{above}/out")
            if line is None:
                assert left == [kind], left
                store.PreparedDataset.open(f"{above}/out/{kind}")
                return kind, "other"
            assert left == [] and len(line) < 1000, (left, line)
            assert above in line or line.startswith("--"), line
            return kind, "refused"


def _prepare(source, kind, out):
    """Prepares a source; returns the line that refuses it, or None."""
    quotes = {"quotechar": '"'} if kind == "tsv" else {}  # As the csv module writes them.
    with contextlib.redirect_stdout(io.StringIO()):
        return test_broken_input.run(source, os.path.join(out, kind), **quotes)


def _mutate(rng, path):
    ways = [_insert, _insert, _change_bytes, model_directories.put_special]
    if path.suffix == ".jsonl":
        ways += [_change_row] * 3
    way = ways[rng.integers(len(ways))]
    return f"{way.__name__}: {way(rng, path)}"


def _insert(rng, path):
    data, at = path.read_bytes(), rng.integers(path.stat().st_size)
    junk, drop = _JUNK[rng.integers(len(_JUNK))], int(rng.integers(0, 20))
    path.write_bytes(data[:at] + junk + data[at + drop :])
    return f"{junk[:20]!r} at {at} for {drop} bytes"


def _change_bytes(rng, path):
    changes = (
        test_tampered_run.flipped, test_tampered_run.overwritten, test_tampered_run.truncated,
    )  # fmt: skip
    change = changes[rng.integers(len(changes))]
    path.write_bytes(change(path.read_bytes(), rng))
    return change.__name__


def _change_row(rng, path):
    lines = path.read_text().splitlines()
    at = rng.integers(len(lines))
    lines[at] = json.dumps(mutations.changed(rng, json.loads(lines[at])))
    path.write_text("\n".join(lines) + "\n")
    return f"row {at}"
