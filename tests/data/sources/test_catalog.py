"""Tests of public data sets by name, with small synthetic files in the published formats."""

import gzip
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest

from tests.data.sources.published_files import (
    PREFIX,
    SIZES,
    random_rows,
    relevance_of,
    shrink_catalogue,
    titles,
    titles_and_contents,
    write_filters,
    write_json,
    write_lines,
)
from vixml_jax.data.sources import catalog, published, tfds_records
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink_catalogue(monkeypatch)


def read(tmp_path, name="lf_amazon_131k"):
    return catalog.read(name, data_dir=str(tmp_path / "tfds"), manual_dir=str(tmp_path / "raw"))


def refused(tmp_path, name="lf_amazon_131k"):
    """The error message of reading the data set, after which no build may exist."""
    with pytest.raises(InputError) as error:
        read(tmp_path, name)
    message = str(error.value)
    assert "\n" not in message
    assert not list((tmp_path / "tfds").glob("*/[0-9]*"))
    assert not list((tmp_path / "tfds").glob("*/incomplete*"))
    return message


def check_equal(raw, held, texts, with_ids=True):
    for part, items in {
        "labels": raw.labels,
        "train": raw.train.items,
        "test": raw.test.items,
    }.items():
        assert items.count == SIZES[part]
        for _ in range(2):  # Texts can be read more than once.
            assert [text for chunk in items.read_texts() for text in chunk] == texts(held[part])
        if with_ids:
            assert list(items.ids) == [row["uid"] for row in held[part]]
        else:
            assert items.ids is None and items.name(3) == "3"
    for split in ("train", "test"):
        matrix = getattr(raw, split).relevance
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix.toarray(), relevance_of(held[split]))
        for number, row in enumerate(held[split]):
            assert matrix[number].indices.tolist() == sorted(row["target_ind"])


@pytest.mark.parametrize(
    "name, texts", [("lf_amazontitles_1.3m", titles), ("lf_wikiseealso_320k", titles_and_contents)]
)
def test_read_json(tmp_path, name, texts):
    held = write_json(tmp_path / "raw", random_rows())
    assert titles(held["train"]) != titles_and_contents(held["train"])
    pairs = write_filters(tmp_path / "raw")
    raw = read(tmp_path, name)
    check_equal(raw, held, texts)
    assert raw.name == catalog.CATALOG[name].name
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(raw, split).filter, pairs[split])
    shutil.rmtree(tmp_path / "raw")  # The build does not need the published files.
    again = read(tmp_path, name)
    check_equal(again, held, texts)
    np.testing.assert_array_equal(again.test.filter, pairs["test"])
    assert again.fingerprint == raw.fingerprint


def test_filters_are_none_without_filter_files(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    raw = read(tmp_path)
    assert raw.train.filter is None and raw.test.filter is None


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    "name, layout", [("eurlex_4k", published.PECOS), ("mm_amazontitles_300k", published.MUFIN)]
)
def test_read_lines(tmp_path, name, layout, encoding):
    held = write_lines(tmp_path / "raw", random_rows(), layout, encoding)
    raw = read(tmp_path, name)
    assert any("ï" in text for text in titles(held["train"]))
    check_equal(raw, held, titles, with_ids=layout.with_ids)


def test_data_set_with_two_releases(tmp_path):
    held = write_json(tmp_path / "raw", random_rows())
    check_equal(read(tmp_path, "mm_amazontitles_300k"), held, titles)


def test_uncompressed_json(tmp_path):
    held = write_json(tmp_path / "raw", random_rows())
    with gzip.open(tmp_path / "raw" / "tst.json.gz") as file:
        (tmp_path / "raw" / "tst.json").write_bytes(file.read())
    (tmp_path / "raw" / "tst.json.gz").unlink()
    check_equal(read(tmp_path), held, titles_and_contents)


def test_random_access_with_tfds(tmp_path):
    """With the decoding of TFDS, through our builder and through TFDS's builders of the build."""
    import tensorflow_datasets as tfds

    held = write_json(tmp_path / "raw", random_rows())
    maker = catalog.builder(
        "lf_amazontitles_1.3m", data_dir=str(tmp_path / "tfds"), manual_dir=str(tmp_path / "raw")
    )
    maker.download_and_prepare()
    by_name = tfds.builder("lf_amazontitles_1_3m", data_dir=tmp_path / "tfds")
    for opened in (maker, by_name, tfds.builder_from_directory(maker.data_dir)):
        assert opened.info.citation == catalog.CATALOG["lf_amazontitles_1.3m"].citation
        assert opened.info.disable_shuffling
        for part, rows in held.items():
            source = opened.as_data_source(part)
            assert len(source) == len(rows)
            for row in np.random.default_rng(0).permutation(len(rows)).tolist():
                example = source[row]
                for name in ("uid", "title", "content"):
                    assert example[name].decode() == rows[row][name]
                assert np.asarray(example["labels"]).tolist() == rows[row].get("target_ind", [])
    names = [path.name for path in pathlib.Path(maker.data_dir).glob("*train*")]
    assert len(names) == 5 and all("array_record" in name for name in names)


def test_reading_imports_neither_tensorflow_nor_jax(tmp_path):
    held = write_json(tmp_path / "raw", random_rows())
    program = f"""
import dataclasses, sys
from vixml_jax.data.sources import catalog
key = "lf_amazon_131k"
catalog.CATALOG[key] = dataclasses.replace(catalog.CATALOG[key], **{SIZES})
raw = catalog.read(key, data_dir={str(tmp_path / "tfds")!r}, manual_dir={str(tmp_path / "raw")!r})
texts = [text for chunk in raw.train.items.read_texts() for text in chunk]
print(len(texts), "tensorflow" in sys.modules, "jax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{len(held['train'])} False False"


def test_existing_build_is_reused(tmp_path, monkeypatch):
    write_json(tmp_path / "raw", random_rows())
    read(tmp_path)
    monkeypatch.setattr(published, "read", lambda *_: pytest.fail("the data set was rebuilt"))
    read(tmp_path)


def test_a_build_that_another_process_made_meanwhile_is_used(tmp_path):
    held = write_json(tmp_path / "raw", random_rows())
    directories = {"data_dir": str(tmp_path / "tfds"), "manual_dir": str(tmp_path / "raw")}
    makers = [catalog.builder("lf_amazon_131k", **directories) for _ in range(2)]
    for maker in makers:
        tfds_records.build(maker)
    assert {part: len(makers[1].as_data_source(part)) for part in held} == SIZES


def test_processes_that_start_together_build_once(tmp_path, monkeypatch):
    held = write_json(tmp_path / "raw", random_rows())
    builds, original = [], tfds_records._write_extra_files

    def slow(*arguments):
        builds.append(arguments)
        time.sleep(1)
        original(*arguments)

    monkeypatch.setattr(tfds_records, "_write_extra_files", slow)
    with futures.ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: read(tmp_path), range(3)):
            check_equal(found, held, titles_and_contents)
    assert len(builds) == 1
    left = [path.name for path in (tmp_path / "tfds" / "lf_amazon_131k").iterdir()]
    assert left == ["1.0.0"] and not list((tmp_path / "tfds").glob(".*"))


def test_changed_files_are_noticed(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    read(tmp_path)
    write_filters(tmp_path / "raw")
    with pytest.raises(InputError, match=r"built before filter_labels_test\.txt, filter_.*remove"):
        read(tmp_path)
    shutil.rmtree(tmp_path / "tfds" / "lf_amazon_131k")
    assert read(tmp_path).test.filter is not None


@pytest.mark.parametrize("part", SIZES)
@pytest.mark.parametrize("change", [-1, 2])
def test_wrong_number_of_rows_is_refused(tmp_path, part, change):
    held = random_rows()
    held[part] = held[part][:change] if change < 0 else held[part] + held[part][:change]
    write_json(tmp_path / "raw", held)
    message = refused(tmp_path)
    path = str(tmp_path / "raw" / f"{PREFIX[part]}.json.gz")
    count = SIZES[part]
    assert f"{path}: {count + change} rows, but LF-Amazon-131K" in message
    assert f"published with {count} {part} rows" in message


def test_rows_after_a_full_shard_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_records, "_SHARD", SIZES["train"])
    held = random_rows()
    held["train"].append(held["train"][0])
    write_json(tmp_path / "raw", held)
    assert "24 rows" in refused(tmp_path)


@pytest.mark.parametrize("layout", [published.PECOS, published.MUFIN])
def test_wrong_shape_of_relevance_is_refused(tmp_path, layout):
    name = "eurlex_4k" if layout is published.PECOS else "mm_amazontitles_300k"
    held = random_rows()
    held["test"] = held["test"][:-1]
    write_lines(tmp_path / "raw", held, layout)
    assert re.search(r"6 queries, 9 labels, but .* with 7 test queries", refused(tmp_path, name))


def test_error_names_all_missing_files(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    for name in ("lbl", "tst"):
        (tmp_path / "raw" / f"{name}.json.gz").unlink()
    message = refused(tmp_path)
    for name in ("lbl", "tst"):
        assert str(tmp_path / "raw" / f"{name}.json.gz") in message
    assert "trn.json.gz" not in message
    dataset = catalog.CATALOG["lf_amazon_131k"]
    assert dataset.homepage in message and dataset.download in message and "--manual_dir" in message
    assert f"into {tmp_path / 'raw'}" in message


def test_default_manual_directory(tmp_path):
    with pytest.raises(InputError) as error:
        catalog.read("eurlex_4k", data_dir=str(tmp_path))
    assert str(tmp_path / "downloads" / "manual" / "eurlex_4k") in str(error.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"target_ind": [1, 9]}, "9 in target_ind, expected 0 to 8"),
        ({"target_ind": [-1]}, "-1 in target_ind, expected 0 to 8"),
        ({"target_ind": [1.0]}, "1.0 in target_ind"),
        ({"target_ind": [True]}, "True in target_ind"),
        ({"target_ind": [2, 4, 2]}, "duplicate label 2 in target_ind"),
        ({"target_ind": "3"}, "target_ind is '3', expected a list"),
        ({"target_ind": None}, "target_ind is None"),
        ({"target_ind": [2, 4], "target_rel": [1.0]}, "target_rel is [1.0], expected a positive"),
        ({"target_ind": [2], "target_rel": [0.0]}, "target_rel is [0.0]"),
        ({"uid": None}, "no 'uid'"),
        ({"uid": ""}, "no 'uid'"),
        ({"title": None}, "no 'title'"),
        ({"title": ["red"]}, "'title' is \"['red']\", expected text"),
        ({"content": "\ud800"}, "contains a lone surrogate"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, change, expected):
    held = random_rows()
    held["train"][16] |= {"target_rel": None} | change
    held["train"][16] = {
        name: value for name, value in held["train"][16].items() if value is not None
    }
    write_json(tmp_path / "raw", held)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'raw' / 'trn.json.gz'}, line 17: ")
    assert expected in message


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"uid": "a", "title": ', "not JSON"),
        (b'{"uid": "\xff"}', "is not utf-8"),
        (b"[1]", "object"),
    ],
)
def test_invalid_lines_are_refused(tmp_path, line, expected):
    write_json(tmp_path / "raw", random_rows())
    path = tmp_path / "raw" / "tst.json.gz"
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    lines[2] = line
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    message = refused(tmp_path)
    assert message.startswith(f"{path}, line 3: ") and expected in message


def test_truncated_file_is_refused(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    path = tmp_path / "raw" / "trn.json.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path}: truncated or damaged" in refused(tmp_path)


def test_files_with_titles_only_are_refused_for_a_data_set_with_content(tmp_path):
    held = random_rows()
    for rows in held.values():
        for row in rows:
            row["content"] = ""
    write_json(tmp_path / "raw", held)
    assert "no row has 'content'" in refused(tmp_path)
    check_equal(read(tmp_path, "lf_amazontitles_131k"), held, titles)


def test_line_without_id_is_refused(tmp_path):
    write_lines(tmp_path / "raw", random_rows(), published.MUFIN)
    path = tmp_path / "raw" / "raw_data" / "test.raw.txt"
    path.write_text(path.read_text().replace("Bte0003->", "Bte0003 "))
    assert f"{path}, line 4: found 'Bte0003" in refused(tmp_path, "mm_amazontitles_300k")


def test_invalid_filter_files_are_refused(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    (tmp_path / "raw" / "filter_labels_test.txt").write_text("0 1\n0 99\n")
    assert "filter_labels_test.txt, line 2" in refused(tmp_path)


def test_build_succeeds_after_an_error_is_corrected(tmp_path):
    held = random_rows()
    good = held["train"][20]["target_ind"]
    held["train"][20] |= {"target_ind": [99], "target_rel": [1.0]}
    write_json(tmp_path / "raw", held)
    refused(tmp_path)
    held["train"][20] |= {"target_ind": good, "target_rel": [1.0] * len(good)}
    write_json(tmp_path / "raw", held)
    check_equal(read(tmp_path), held, titles_and_contents)


def test_killed_build_is_not_used(tmp_path):
    held = write_json(tmp_path / "raw", random_rows())
    program = f"""
import dataclasses, time
from vixml_jax.data.sources import catalog, published
key = "lf_amazon_131k"
catalog.CATALOG[key] = dataclasses.replace(catalog.CATALOG[key], **{SIZES})
def slow(*arguments, read=published.read):
    for n, row in enumerate(read(*arguments)):
        if arguments[2] == "train" and n == 11:
            print("half", flush=True)
            time.sleep(60)
        yield row
published.read = slow
catalog.read(key, data_dir={str(tmp_path / "tfds")!r}, manual_dir={str(tmp_path / "raw")!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(line == "half\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    remaining = list((tmp_path / "tfds" / "lf_amazon_131k").iterdir())
    assert remaining and all(path.name.startswith("incomplete") for path in remaining)
    check_equal(read(tmp_path), held, titles_and_contents)


def test_full_disk_leaves_no_files(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    program = f"""
import dataclasses, resource, signal
from vixml_jax.data.sources import catalog
from vixml_jax.errors import InputError
key = "lf_amazon_131k"
catalog.CATALOG[key] = dataclasses.replace(catalog.CATALOG[key], **{SIZES})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    catalog.read(key, data_dir={str(tmp_path / "tfds")!r}, manual_dir={str(tmp_path / "raw")!r})
except InputError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith("refused: --data_dir=") and "File too large" in last
    assert not list((tmp_path / "tfds" / "lf_amazon_131k").iterdir())


@pytest.mark.parametrize(
    "damage", ["rows", "published.json", "dataset_info.json", "a shard", "half a shard"]
)
def test_damaged_build_is_refused(tmp_path, damage):
    write_json(tmp_path / "raw", random_rows())
    read(tmp_path)
    built = tmp_path / "tfds" / "lf_amazon_131k" / "1.0.0"
    if damage == "rows":
        info = json.loads((built / "dataset_info.json").read_text())
        train = next(split for split in info["splits"] if split["name"] == "train")
        train["shardLengths"] = train["shardLengths"][:-1]
        (built / "dataset_info.json").write_text(json.dumps(info))
    elif damage == "half a shard":
        path = sorted(built.glob("*train*"))[2]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        (sorted(built.glob("*test*"))[1] if damage == "a shard" else built / damage).unlink()
    with pytest.raises(InputError, match=f"remove {re.escape(str(built))}"):
        read(tmp_path)
