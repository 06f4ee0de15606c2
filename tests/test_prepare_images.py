"""Preparing data with image files: embeddings, resuming, invalid files, and URLs."""

import base64
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pyarrow
import pytest
import torch
import transformers
from absl import flags
from PIL import Image
from pyarrow import parquet

from vixml_jax import prepare
from vixml_jax.data.images import image_files
from vixml_jax.data.images.embedding_store import EmbeddingStore
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.image_encoding.finder import ImageFinder

SIZE = 16


def image(rng, size=(23, 11)):
    values = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert("RGB")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a tiny SigLIP of `transformers`, its tower and its image processor."""
    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            image_size=SIZE, patch_size=4, hidden_size=8, intermediate_size=12,
            num_hidden_layers=1, num_attention_heads=2,
        )
    ).eval()  # fmt: skip
    tower.save_pretrained(path)
    processor = transformers.SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(path)
    return str(path), tower, processor


@pytest.fixture
def source(tmp_path):
    """Three training queries, two test queries, two labels; one file is a duplicate, one broken,
    one missing."""
    rng = np.random.default_rng(0)
    root = tmp_path / "shop"
    (root / "images").mkdir(parents=True)
    for name in ("a", "b", "c"):
        image(rng).save(root / "images" / f"{name}.png")
    shutil.copy(root / "images" / "a.png", root / "images" / "same_as_a.png")
    content = (root / "images" / "b.png").read_bytes()
    (root / "images" / "half.png").write_bytes(content[: len(content) // 2])
    (root / "trn.raw.txt").write_text("red shoe\nblue shoe\ngreen hat\n")
    (root / "tst.raw.txt").write_text("red hat\nblue hat\n")
    (root / "lbl.raw.txt").write_text("shoe\nhat\n")
    (root / "trn_X_Y.txt").write_text("3 2\n0:1\n0:1\n1:1\n")
    (root / "tst_X_Y.txt").write_text("2 2\n1:1\n1:1\n")
    (root / "trn_images.txt").write_text(
        "images/a.png\timages/b.png\n\nimages/half.png\timages/c.png\n"
    )
    (root / "tst_images.txt").write_text("images/same_as_a.png\nimages/gone.png\n")
    return root


def run(source, out, model, **changes):
    values = flags.FlagValues()
    prepare.define_flags(values)
    settings = {"source": source, "out": out, "images": model, "image_batch": 2} | changes
    values(["prepare", *(f"--{name}={value}" for name, value in settings.items())])
    prepare.run(values)
    return PreparedDataset.open(str(out))


def test_image_files_are_embedded(model, source, tmp_path, capsys):
    path, tower, processor = model
    dataset = run(source, tmp_path / "out", path)
    assert dataset.image_width == 8 and dataset.labels.images is None
    np.testing.assert_array_equal(dataset.train.images.offsets, [0, 2, 2, 3])
    np.testing.assert_array_equal(dataset.test.images.offsets, [0, 1, 1])
    files = [Image.open(source / "images" / f"{name}.png") for name in "abc"]
    with torch.no_grad():
        expected = tower(**processor(files, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(dataset.train.images.values, expected, atol=2e-3)  # float16.
    np.testing.assert_array_equal(dataset.test.images.values[0], dataset.train.images.values[0])
    stored = (tmp_path / "out.images" / "digests.txt").read_text().split()
    assert len(stored) == len(set(stored)) == 3  # The duplicate is embedded once.
    broken = (tmp_path / "out.images" / "broken.txt").read_text().splitlines()
    assert [line.split("\t")[0].rsplit("/", 1)[1] for line in broken] == ["half.png", "gone.png"]
    assert "2 missing or broken, listed in" in capsys.readouterr().out


def test_interrupted_embedding_resumes(model, source, tmp_path, monkeypatch):
    path, rng = model[0], np.random.default_rng()
    names = [f"images/d{i}.png" for i in range(10)]
    for name in names:
        image(rng).save(source / name)
    with open(source / "trn_images.txt", "a") as file:  # The third item has two images so far.
        file.seek(file.tell() - 1)
        file.truncate()
        file.write("".join(f"\t{name}" for name in names) + "\n")
    expected = run(source, tmp_path / "expected", path)
    add = EmbeddingStore.add

    def stop(self, digests, vectors):
        add(self, digests, vectors)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddingStore, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", path)
    monkeypatch.undo()
    store = tmp_path / "out.images" / "part"
    assert len((store / "digests.txt").read_text().split()) == 7  # One of eight is broken.
    # As if killed in the next batch: one and a half vectors, and part of a digest.
    with open(store / "vectors.f16", "ab") as file:
        file.write(b"x" * 24)
    with open(store / "digests.txt", "a") as file:
        file.write("abc")
    embedded = []
    monkeypatch.setattr(
        image_files, "load_pixels", lambda path, *a, load=image_files.load_pixels, **k:
        embedded.append(path) or load(path, *a, **k),
    )  # fmt: skip
    again = run(source, tmp_path / "out", path)
    found = sorted(name.rsplit("/", 1)[1] for name in embedded)
    assert found == [*(f"d{i}.png" for i in range(4, 10)), "half.png"]
    np.testing.assert_array_equal(again.train.images.values, expected.train.images.values)
    np.testing.assert_array_equal(again.test.images.values, expected.test.images.values)


def test_embeddings_of_another_model_are_refused(model, source, tmp_path):
    run(source, tmp_path / "out", model[0])
    with pytest.raises(InputError, match=r"about\.json: embeddings of another model or with other"):
        run(source, tmp_path / "out", model[0], keep_aspect=True, overwrite=True)


def test_error_messages_name_the_file(model, source, tmp_path):
    (source / "tst_images.txt").write_text("images/a.png\n")
    with pytest.raises(
        InputError, match=r"tst_images.txt: found 1 lines, expected 2, as many as texts"
    ):
        run(source, tmp_path / "out", model[0])
    for name in ("trn", "tst"):
        (source / f"{name}_images.txt").unlink()
    with pytest.raises(InputError, match=r"names no image files"):
        run(source, tmp_path / "out", model[0])
    (source / "trn_images.txt").write_bytes(b"images/a.png\n\xff\n\n")
    with pytest.raises(InputError, match=r"trn_images.txt: paths are not UTF-8"):
        run(source, tmp_path / "out", model[0])
    rows = [{"text": "a", "labels": ["x"], "image": name} for name in ("b.png", {"bytes": "b"})]
    (source / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"q.jsonl, line 2: 'image' is 'b', expected text .* or"):
        run(source / "q.jsonl", tmp_path / "out", model[0])
    other = tmp_path / "other"
    shutil.copytree(model[0], other)
    about = json.loads((other / "preprocessor_config.json").read_text())
    about["size"] = {"height": 8, "width": 8}
    (other / "preprocessor_config.json").write_text(json.dumps(about))
    (source / "trn_images.txt").write_text("images/a.png\n\n\n")
    with pytest.raises(InputError, match="images of 8 x 8, but the model expects 16 x 16"):
        run(source, tmp_path / "out", str(other))
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config.json: not found"):
        run(source, tmp_path / "out", str(other))


def write_jsonl(path, images):
    """A table of queries with the images; half of them are held out."""
    rows = [{"text": f"shoe {i}", "labels": ["x"], "image": x} for i, x in enumerate(images)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_directory_with_other_data_is_refused_before_images_are_read(
    model, source, tmp_path, monkeypatch
):
    run(source, tmp_path / "out", model[0])
    embed = []
    monkeypatch.setattr(ImageFinder, "embed_dataset", lambda *a, **k: embed.append(a))
    with pytest.raises(InputError, match=r"prepared data set that differs in max_tokens"):
        run(source, tmp_path / "out", model[0], max_tokens=9)
    with pytest.raises(InputError, match=r"--valid=0.5: .*at least|--split_by=group:x|no column"):
        run(source, tmp_path / "new", model[0], split_by="group:x", valid=0.5)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match=r"taken"):
        run(source, tmp_path / "taken", model[0])
    run(source, tmp_path / "out", model[0])  # The same again: kept as it is.
    assert not embed
    with pytest.raises(InputError, match=r"no/such/model: no such directory; expected a Hugging"):
        run(tmp_path / "no.csv", tmp_path / "new", "no/such/model")  # Before the source is read.


@pytest.mark.parametrize("kind", ["column", "files"])
def test_images_that_are_not_read_are_counted(kind, model, source, tmp_path, capsys):
    if kind == "column":
        write_jsonl(source / "q.jsonl", ["a.png|b.png", None, ["c.png"], {"bytes": 5}, "a.png"])
        path, line = source / "q.jsonl", "warning: 5 images named, not read: add --images="
    else:
        path, line = source, "warning: 6 images named, not read: add --images="
    assert run(path, tmp_path / "out", "").image_width == 0
    assert line in capsys.readouterr().out
    for images, told in (("", True), (model[0], False)):
        if kind == "column":
            write_jsonl(path, ["a.png|b.png", None, ["c.png"], "images/a.png", "images/b.png"])
        values = flags.FlagValues()
        prepare.define_flags(values)
        values(["prepare", f"--source={path}", f"--images={images}", "--dry_run"])
        prepare.run(values)
        printed = capsys.readouterr().out
        assert (line in printed) == told
        gone = "3 of 5" if kind == "column" else "1 of 6"
        assert (f"image files that do not exist: {gone}; the first is" in printed) != told
    assert sorted(os.listdir(tmp_path)) == ["out", "shop"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_contents_in_a_table_are_embedded_like_files(kind, model, source, tmp_path):
    contents = [(source / "images" / f"{name}.png").read_bytes() for name in "abc"]
    (source / "broken").mkdir()
    broken = contents[0][:40]
    cells = [{"bytes": x, "path": "x.png"} for x in contents]
    cells += [{"bytes": broken, "path": None}, {"bytes": None, "path": "images/b.png"}, None]
    if kind == "parquet":
        table = pyarrow.table({"text": list("abcdef"), "labels": ["x"] * 6, "image": cells})
        parquet.write_table(table, source / "q.parquet")
        where = "q.parquet, row 4"
    else:
        texts = [base64.b64encode(x).decode() for x in [*contents, broken]]
        urls = [f"data:image/png;base64,{text}" for text in texts]
        cells = [texts[0], urls[1], {"bytes": texts[2]}, urls[3], {"path": "images/b.png"}, None]
        if kind == "csv":
            cells = [urls[0], urls[1], urls[2], urls[3], "images/b.png", ""]
            with open(source / "q.csv", "w", encoding="utf-8") as file:
                file.write("text,labels,image\n")
                file.writelines(f'{t},x,"{c}"\n' for t, c in zip("abcdef", cells, strict=True))
        else:
            write_jsonl(source / "q.jsonl", cells)
        where = f"q.{kind}, line {5 if kind == 'csv' else 4}"
    path, tower, processor = model
    dataset = run(source / f"q.{kind}", tmp_path / "out", path, test=0.5)
    files = [Image.open(source / "images" / f"{name}.png") for name in "abc"]
    with torch.no_grad():
        a, b, c = tower(**processor(files, return_tensors="pt")).pooler_output.numpy()
    expected = {0: [a], 1: [b], 2: [c], 3: [], 4: [b], 5: []}
    for queries in (dataset.train, dataset.test):
        values = [vector for name in queries.ids for vector in expected[int(name)]]
        lengths = [len(expected[int(name)]) for name in queries.ids]
        np.testing.assert_array_equal(np.diff(queries.images.offsets), lengths)
        np.testing.assert_allclose(queries.images.values, values, atol=2e-3)  # float16.
    (line,) = (tmp_path / "out.images" / "broken.txt").read_text().splitlines()
    assert line.startswith(f"{source / where}\t")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.images", "shop"]  # Nothing else is left.


def test_no_image_at_all_is_refused(model, tmp_path):
    write_jsonl(tmp_path / "q.jsonl", ["gone.png", "gone/too.png", "x.svg", None])
    (tmp_path / "x.svg").write_text("<svg/>")
    with pytest.raises(InputError) as caught:
        run(tmp_path / "q.jsonl", tmp_path / "out", model[0])
    assert str(caught.value).startswith(f"--images={model[0]}: none of the 3 images that q names")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_embeddings_of_another_reader_are_replaced(model, source, tmp_path, capsys):
    expected = run(source, tmp_path / "out", model[0])
    about = tmp_path / "out.images" / "about.json"
    stored = json.loads(about.read_text())
    del stored["reader"]  # As version 0.3 wrote it.
    about.write_text(json.dumps(stored))
    vectors = tmp_path / "out.images" / "vectors.f16"
    vectors.write_bytes(bytes(len(vectors.read_bytes())))
    found = run(source, tmp_path / "out", model[0], overwrite=True)
    assert "the images are embedded again" in capsys.readouterr().out
    np.testing.assert_array_equal(found.train.images.values, expected.train.images.values)
    assert "reader" in json.loads(about.read_text())


def test_invalid_image_files_are_listed(model, tmp_path, monkeypatch):
    image(np.random.default_rng(0)).save(tmp_path / "valid.png")
    image(np.random.default_rng(0), size=(90, 90)).save(tmp_path / "huge.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "directory.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # Reading it would never end.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    faults = {
        "huge.png": "decompression bomb",
        "empty.png": "cannot identify",
        "text.png": "cannot identify",
        "directory.png": "cannot be read",
        "pipe.png": "cannot be read",
        "no\0file.png": "cannot be read",
        "gone.png": "cannot be read",
    }
    rows = [{"text": name, "labels": ["x"], "image": name} for name in ("valid.png", *faults)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = run(tmp_path / "q.jsonl", tmp_path / "out", model[0])
    counts = (len(part.images.values) for part in (dataset.train, dataset.test) if part.images)
    assert sum(counts) == 1
    broken = (tmp_path / "out.images" / "broken.txt").read_text()
    for name, fault in faults.items():
        line = next(line for line in broken.split("\n") if f"{os.sep}{name}\t" in line)
        assert fault in line


@pytest.fixture
def server(source):
    """Serves the images; yields its address and a list of the requested paths."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(source / "images"))

        def do_GET(self):
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", requested
        serving.shutdown()


def test_image_column_of_paths_and_urls(model, source, tmp_path, server, capsys):
    address, requested = server
    expected = run(source, tmp_path / "expected", model[0])
    item_images = [
        f"images/a.png|{address}/b.png", "", f"{address}/half.png|{address}/c.png",
        f"{address}/same_as_a.png", f"{address}/gone.png",
    ]  # fmt: skip
    texts = ["red shoe", "blue shoe", "green hat", "red hat", "blue hat"]
    rows = [
        f"{text},{text.split()[1]},{'train' if row < 3 else 'test'},{image}\n"
        for row, (text, image) in enumerate(zip(texts, item_images, strict=True))
    ]
    (source / "shop.csv").write_text("text,labels,split,image\n" + "".join(rows))
    table, out = source / "shop.csv", tmp_path / "out"
    refused = run(table, tmp_path / "refused", model[0])
    assert len(refused.train.images.values) == 1  # Only the file;
    assert requested == []  # the URLs have a loopback address.
    dataset = run(table, out, model[0], allow_private_hosts=True)
    assert len(requested) == len(set(requested)) == 5
    for split in ("train", "test"):
        images, same = getattr(dataset, split).images, getattr(expected, split).images
        np.testing.assert_array_equal(images.offsets, same.offsets)
        np.testing.assert_array_equal(images.values, same.values)
    assert dataset.labels.images is None
    assert "2 missing or broken, listed in" in capsys.readouterr().out
    broken = (tmp_path / "out.images" / "broken.txt").read_text()
    assert f"{address}/gone.png\t" in broken and f"{address}/half.png\t" in broken
    run(table, out, model[0], allow_private_hosts=True, overwrite=True)
    assert sorted(requested[5:]) == ["/gone.png"]  # The others exist already.
