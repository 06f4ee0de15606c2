"""Image files of queries: embedded like those of the run's data; broken files are reported."""

import base64
import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vixml_jax import train, workdir
from vixml_jax.data.images.image_embeddings import FileImages
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.query_images import QueryImages
from vixml_jax.serving.requests import Query

WORDS = "red green blue black white round square long".split()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A directory with images and a table of their paths, and a run trained on it."""
    root, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    (root / "png").mkdir()
    with open(root / "shop.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "tags", "image"])
        for i in range(60):
            words = rng.choice(WORDS, 2, replace=False)
            pixels = rng.integers(0, 255, (9, 7, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"png/{i}.png")
            writer.writerow([i, " ".join(words), "|".join(words), f"png/{i}.png" if i % 3 else ""])
    model = tiny.make_siglip(root / "siglip", 16, 8, width=12)
    tiny.run_command(
        "prepare", f"--source={root / 'shop.csv'}", f"--out={root / 'data'}", f"--images={model}",
        "--max_tokens=8",
    )  # fmt: skip
    config = tiny.configuration(str(root / "data"), root / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1))
    train.train(config)
    return root, config


def test_image_files_are_embedded_like_those_of_the_data(shop, tmp_path):
    root, config = shop
    (root / "png/broken.png").write_bytes((root / "png/1.png").read_bytes()[:40])
    dataset = workdir.open_dataset(config)
    rows, expected = [], []
    offsets = dataset.test.images.offsets
    for row, name in enumerate(dataset.test.ids):
        has_image = int(name) % 3
        rows.append({"id": name, "title": dataset.test.texts[row]})
        if has_image:  # Some as files, some as their contents.
            content = base64.b64encode((root / f"png/{name}.png").read_bytes()).decode()
            rows[-1]["image"] = f"png/{name}.png" if int(name) % 2 else {"bytes": content}
        expected.append(dataset.test.images.values[offsets[row]] if has_image else None)
    rows += [{"id": f"x{i}", "title": "red", "image": f"png/{x}.png"} for i, x in
             enumerate(("broken", "missing"))]  # fmt: skip
    rows.append({"id": "x2", "title": "red", "image": "data:image/png;base64,QUJD"})
    queries, out = root / "queries.jsonl", tmp_path / "out.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = tiny.run_command(
        "predict", f"--workdir={config.workdir}", f"--queries={queries}", f"--out={out}", "--k=3"
    )
    assert f"{len(rows)} of {len(rows)} queries predicted" in printed
    found = [json.loads(line) for line in out.read_text().splitlines()]
    predictor = Predictor.load(config.workdir, warm=False)
    texts = [row["title"] for row in rows]
    with_images = predictor(texts, [*expected, None, None, None], k=3)
    without_images = predictor(texts, k=3)
    for row, predictions in zip(found, with_images, strict=True):
        scores = [label["score"] for label in row["labels"]]
        np.testing.assert_allclose(scores, [x.score for x in predictions], rtol=1e-3)
    # Images make a difference.
    assert any(a != b for a, b in zip(with_images, without_images, strict=True))
    for row, name in zip(found[-3:], ("broken.png", "missing.png", "of 3 bytes"), strict=True):
        assert row["note"].startswith("image ") and name in row["note"]
    assert not any("note" in row for row in found[:-3])


def test_the_report_shows_image_files(shop):
    root, config = shop
    printed = tiny.run_command(
        "evaluate", f"--workdir={config.workdir}", "--report",
        f"--report_images={root / 'shop.csv'}",
    )  # fmt: skip
    page = printed.split("report written to ")[1].splitlines()[0]
    with open(page, encoding="utf-8") as file:
        assert '<img src="data:image/png;base64,' in file.read()
    error = tiny.run_command(
        "evaluate", f"--workdir={config.workdir}", "--report_images=x", status=2
    )
    assert error.count("\n") == 1 and "--report_images=x: add --report" in error


class Finder:
    """Embeds the image "n.png" as the number n in all columns; others are broken."""

    def __init__(self):
        self.broken = {}

    def embed(self, name, images):
        del name
        self.broken = {x: "broken" for names in images for x in names if x == "broken.png"}
        rows = np.full((len(images), 2), -1)
        for at, names in enumerate(images):
            kept = [int(x.removesuffix(".png")) for x in names if x not in self.broken]
            rows[at, : len(kept)] = kept
        return FileImages(rows, np.arange(9)[:, None] * np.ones((1, 12)), "images")


def test_a_query_may_have_embeddings_and_image_files():
    given = np.full((1, 12), 7, np.float16)
    columns = [([], given), (["3.png"], None), (["2.png", "5.png"], given), (["broken.png"], given),
               (["broken.png"], None), ([], None), (["4.png"], given[:, :3]),
               (["broken.png"], given[:, :3])]  # fmt: skip
    queries = [Query(i, str(i), "", *both, []) for i, both in enumerate(columns)]
    vectors, notes = QueryImages(12, Finder()).embed(queries)
    found = [None if x is None else x[:, 0].tolist() for x in vectors]
    assert found == [[7.0], [3.0], [7.0, 2.0, 5.0], [7.0], None, None, [4.0], None]
    width = "the image is ignored: its embedding has width 3, expected 12"
    broken = "image broken.png: broken"
    assert notes == ["", "", "", broken, broken, "", width, f"{width}; {broken}"]
