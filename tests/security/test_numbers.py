"""Numbers of flags and files: huge, negative and non-finite ones are refused in a line."""

import dataclasses
import math
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy import sparse

from tests.tiny import make_data
from vixml_jax.config import Config
from vixml_jax.data import preprocessing, store
from vixml_jax.data.sources import readers, xml_repository
from vixml_jax.errors import InputError
from vixml_jax.models import hf_configs
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.runtime import flag_fields, host_memory
from vixml_jax.serving import requests
from vixml_jax.storage import json_files, npy_files

DECODER = DecoderConfig(
    vocab_size=100,
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=2,
    head_width=8,
    mlp_width=32,
)
NUMERIC = [
    name
    for name, _, value in flag_fields.leaves(Config(data="d", workdir="w"))
    if isinstance(value, int | float) and not isinstance(value, bool)
]


def changed(config, name, value):
    group, dot, field = name.rpartition(".")
    if not dot:
        return dataclasses.replace(config, **{field: value})
    values = {group: dataclasses.replace(getattr(config, group), **{field: value})}
    return dataclasses.replace(config, **values)


@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_of_a_run_are_numbers_and_not_absurd(name):
    config = Config(data="d", workdir="w")
    for value in (math.nan, 10**30, -(10**30)):
        with pytest.raises(InputError, match=f"--{name}=") as error:
            flag_fields.check_bounds(changed(config, name, value))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vocab_size", 5_000_000_000),
        ("max_tokens", 10**12),
        ("seed", 1 << 64),
        ("propensity_a", 1e300),
        ("propensity_b", math.inf),
        ("valid", math.nan),
    ],
)
def test_settings_of_prepare_are_bounded(name, value):
    with pytest.raises(InputError, match=f"--{name}="):
        preprocessing.Settings(**{name: value})


@pytest.mark.parametrize("config", [BertConfig(), DECODER], ids=["bert", "decoder"])
def test_sizes_of_a_tower_are_bounded(config):
    hf_configs.check_sizes("config.json", config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wrong = [10**9, -1, "12", None] if isinstance(value, int) else [math.inf, math.nan, "x"]
        for other in wrong:
            try:
                bad = dataclasses.replace(config, **{field.name: other})
            except (TypeError, ValueError):  # Refused earlier.
                continue
            with pytest.raises(InputError, match=r"config\.json: "):
                hf_configs.check_sizes("config.json", bad)


def test_headers_of_arrays_take_no_memory(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(4, np.float32))
    good = path.read_bytes()
    for shape in ("(10000000000000,)", "(4611686018427387904, 4)", "(-1,)", "(1e9,)", "(4, 4)"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        path.write_bytes(good[:10] + text.ljust(117).encode() + b"\n" + good[128:])
        with pytest.raises(InputError, match=r"array\.npy"):
            npy_files.open_mapped(str(path), "remove it")
    for _ in range(300):
        mutated = bytearray(good)
        for at in rng.integers(0, 128, rng.integers(1, 4)):
            mutated[at] = rng.integers(0, 256)
        path.write_bytes(mutated)
        try:
            assert npy_files.open_mapped(str(path), "remove it").size <= 16
        except InputError as error:
            assert "\n" not in str(error)


def test_a_row_of_parquet_that_is_not_utf8_is_the_fault_of_that_row(tmp_path):
    rng = np.random.default_rng(1)
    path, count = str(tmp_path / "table.parquet"), 200
    texts = [f"text {row}".encode() for row in range(count)]
    bad = sorted(rng.choice(count, 9, replace=False).tolist())
    for row in bad:
        texts[row] = b"\xff" + texts[row]
    column = pyarrow.array(texts, pyarrow.binary())
    as_text = pyarrow.Array.from_buffers(pyarrow.string(), count, column.buffers())
    table = {"title": as_text, "other": pyarrow.array(range(count)), "broken": as_text}
    parquet.write_table(pyarrow.table(table), path)
    rows = list(readers.read_rows(path))
    assert [line for line, _ in rows] == list(range(1, count + 1))
    for line, row in rows:
        if line - 1 in bad:
            assert isinstance(row, InputError) and f"table.parquet, row {line}: " in str(row)
        else:
            assert row["title"] == f"text {line - 1}" and row["other"] == line - 1
    # A column that is not asked for is not read.
    (chunk,) = readers.read(path, columns=["other"])
    assert list(chunk.columns["other"]) == list(range(count)) and not chunk.errors


def test_a_relevance_matrix_out_of_range_is_refused(tmp_path):
    """SciPy reads and writes beyond the arrays of such a matrix."""
    rng = np.random.default_rng(2)
    path = make_data(tmp_path)
    dataset = store.PreparedDataset.open(path)
    columns, rows = dataset.num_labels, len(dataset.train)
    for name in ("indices", "indptr"):
        file = tmp_path / "prepared" / f"train_relevance_{name}.npy"
        good = np.load(file)
        for value in (-1, 2**31 - 1, -(2**31), columns if name == "indices" else rows * 1000):
            bad = good.copy()
            bad[rng.integers(1, len(bad))] = value
            np.save(file, bad)
            with pytest.raises(InputError, match=r"train_relevance.*damaged"):
                store.PreparedDataset.open(path)
        np.save(file, good)
    store.PreparedDataset.open(path)


def test_an_npz_that_expands_beyond_the_memory_is_refused(tmp_path, monkeypatch):
    path = str(tmp_path / "trn_X_Y.npz")
    sparse.save_npz(path, sparse.eye(100_000, format="csr"))
    monkeypatch.setattr(host_memory, "available", lambda: 1 << 20)
    with pytest.raises(InputError, match="more than fit into memory"):
        xml_repository._load_relevance(path)
    monkeypatch.undo()
    assert xml_repository._load_relevance(path).nnz == 100_000


@pytest.mark.parametrize(
    "features",
    ['{"a": {"_type": "ClassLabel"}}', '{"a": {"_type": "ClassLabel", "names": 5}}', "[1]", "5"],
)
def test_malformed_metadata_of_datasets_is_one_line(tmp_path, features):
    path = str(tmp_path / "table.parquet")
    metadata = {b"huggingface": f'{{"info": {{"features": {features}}}}}'.encode()}
    schema = pyarrow.schema([("a", pyarrow.int64())], metadata=metadata)
    parquet.write_table(pyarrow.table({"a": [0, 1]}, schema=schema), path)
    with pytest.raises(InputError, match="metadata under 'huggingface' is malformed"):
        list(readers.read_rows(path))


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    for name in ("pipe.csv", "zero.jsonl"):
        path = str(tmp_path / name)
        for read in (
            lambda path: list(readers.read_rows(path)),
            requests.read_filters,
            json_files_read,
        ):
            with pytest.raises(InputError, match="not a regular file"):
                read(path)


def json_files_read(path):
    return json_files.read(path, dict, "remove it")
