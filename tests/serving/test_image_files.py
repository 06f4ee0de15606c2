"""Queries that name picture files: embedded as the run's data were; broken ones are told."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vixml_jax import train, workdir
from vixml_jax.serving.predictor import Predictor

WORDS = "red green blue black white round square long".split()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A directory with pictures, a table that names them, and a run trained on it."""
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
    tiny.door(
        "prepare", f"--source={root / 'shop.csv'}", f"--out={root / 'data'}", f"--images={model}",
        "--max_tokens=8",
    )  # fmt: skip
    config = tiny.configuration(str(root / "data"), root / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1))
    train.train(config)
    return root, config


def test_files_are_read_as_the_data_were(shop, tmp_path):
    root, config = shop
    (root / "png/broken.png").write_bytes((root / "png/1.png").read_bytes()[:40])
    dataset = workdir.open_dataset(config)
    rows, expected = [], []
    offsets = dataset.test.images.offsets
    for row, name in enumerate(dataset.test.ids):
        seen = int(name) % 3
        rows.append({"id": name, "title": dataset.test.texts[row]})
        rows[-1] |= {"image": f"png/{name}.png"} if seen else {}
        expected.append(dataset.test.images.values[offsets[row]] if seen else None)
    rows += [{"id": f"x{i}", "title": "red", "image": f"png/{x}.png"} for i, x in
             enumerate(("broken", "missing"))]  # fmt: skip
    queries, out = root / "queries.jsonl", tmp_path / "out.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = tiny.door(
        "predict", f"--workdir={config.workdir}", f"--queries={queries}", f"--out={out}", "--k=3"
    )
    assert f"{len(rows)} of {len(rows)} queries answered" in said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    predictor = Predictor.load(config.workdir, warm=False)
    texts = [row["title"] for row in rows]
    answers = predictor(texts, [*expected, None, None], k=3)
    bare = predictor(texts, k=3)
    for one, answer in zip(found, answers, strict=True):
        scores = [label["score"] for label in one["labels"]]
        np.testing.assert_allclose(scores, [x.score for x in answer], rtol=1e-3)
    assert any(a != b for a, b in zip(answers, bare, strict=True))  # Pictures count.
    for one, what in zip(found[-2:], ("broken.png", "missing.png"), strict=True):
        assert one["note"].startswith("picture ") and what in one["note"]
    assert not any("note" in one for one in found[:-2])


def test_the_report_shows_them(shop):
    root, config = shop
    said = tiny.door(
        "evaluate", f"--workdir={config.workdir}", "--report",
        f"--report_pictures={root / 'shop.csv'}",
    )  # fmt: skip
    page = said.split("report written to ")[1].splitlines()[0]
    with open(page, encoding="utf-8") as file:
        assert '<img src="data:image/png;base64,' in file.read()
    said = tiny.door("evaluate", f"--workdir={config.workdir}", "--report_pictures=x", status=2)
    assert said.count("\n") == 1 and "say --report, too" in said
