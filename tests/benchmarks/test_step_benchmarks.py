"""The benchmarks with PyTorch baselines on a tiny tower: every program runs on the right texts."""

import dataclasses
import tempfile

import numpy as np
import pytest
import torch

from vixml_jax.benchmarks import encode, packing, train_step, vision
from vixml_jax.benchmarks.baselines import torch_models
from vixml_jax.benchmarks.support import inputs, workers
from vixml_jax.data import packing as packing_lib
from vixml_jax.data import preprocessing
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models import hf_checkpoints
from vixml_jax.models import published_towers as towers
from vixml_jax.models.tower import Tower
from vixml_jax.training import flops

SETTINGS = {
    "batch": 16, "steps": 2, "threads": 1, "texts": 20, "tower": "all-minilm-l6", "rank": 0,
    "images": 0, "chunk": 0, "device": "cpu",
}  # fmt: skip


DECODER = {"tower": "qwen2.5-0.5b", "rank": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("raw")
    words = np.array([f"w{n}" for n in range(30)])
    for split, count in (("trn", 40), ("tst", 5), ("lbl", 30)):
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        (root / f"{split}.raw.txt").write_text("".join(text + "\n" for text in texts))
        if split != "lbl":
            rows = [" ".join(f"{j}:1" for j in rng.choice(30, 2, replace=False)) for _ in texts]
            (root / f"{split}_X_Y.txt").write_text(f"{count} 30\n" + "\n".join(rows) + "\n")
    preprocessing.prepare(
        preprocessing.read_source(str(root)),
        str(root / "out"),
        preprocessing.Settings(max_tokens=16),
    )
    return str(root / "out")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {
        "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 32,
    }  # fmt: skip
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "Qwen/Qwen2.5-0.5B-Instruct"):
        monkeypatch.setitem(towers.CONFIGS, name, {**towers.CONFIGS[name], **sizes})


@pytest.mark.parametrize("whose", ["ours", "torch"])
@pytest.mark.parametrize(
    "tower", [{}, pytest.param(DECODER, marks=pytest.mark.slow), {**DECODER, "images": 2}]
)
def test_a_round_of_training(whose, tower, data):
    programs = [name for name in train_step.PROGRAMS if name.startswith(whose)]
    prepared = train_step.prepare(programs, {**SETTINGS, **tower, "data": data})
    assert list(prepared) == programs
    for name, (about, run) in prepared.items():
        assert about["device"] == "cpu"
        if "all of" in name:  # 16 queries and 16 labels a step, two steps; 7 of a prompt.
            images = tower.get("images", 0)
            prompt = 0 if not tower else 7 if images else 4
            length, num_images = 32 + prompt + images, 64 * images
            config = towers.config_of({**SETTINGS, **tower}["tower"])
            config = dataclasses.replace(
                config, **({"lora_rank": 4} if tower else {}), image_width=1152 if images else 0
            )
            expected = flops.tower_flops(config, np.full(64, length), num_images).step
            expected += flops.combiner_flops(Combiner(8, 1024), 32, 32).step
            expected += 2 * flops.similarity_flops(16, 16, 32, 2).step
            assert about["flops"] == pytest.approx(expected)
        found = run()
        assert 0 < found["loss"] < 3
        if whose == "ours":  # All that the step needs, and so more than its parameters.
            assert found["planned"] > 3 * 4 * 200 * 32


@pytest.mark.parametrize("num_images", [0, 2])
def test_baselines_read_the_same(num_images, data):
    """The same weights and items: the baseline's vectors are ours."""
    settings = {**SETTINGS, "images": num_images, "data": data}
    dataset = train_step.data_of(settings, full=True)
    layout = train_step.layout_of("qwen2.5-0.5b", num_images)
    baseline = torch_models.Tower(
        towers.about("qwen2.5-0.5b"), layout=layout, image_width=train_step.IMAGE_WIDTH
    ).eval()
    with tempfile.TemporaryDirectory() as where:
        baseline.model.save_pretrained(where)
        config, params = hf_checkpoints.load_hf_tower(where)
    ids = np.arange(5)
    packed = packing_lib.pack(dataset.labels, ids, width=64, layout=layout)
    images = None
    if num_images:
        config = dataclasses.replace(config, image_width=train_step.IMAGE_WIDTH)
        weight, bias = (value.detach().numpy() for value in baseline.project.parameters())
        params["image_projection"] = {"kernel": weight.T, "bias": bias}
        images = np.array(dataset.labels.images.values[: 5 * num_images])
        images = torch.from_numpy(images.reshape(5, num_images, -1))
    ours = Tower(config).apply({"params": params}, packed, 5, deterministic=True)
    offsets = dataset.labels.tokens.offsets
    texts = [np.asarray(dataset.labels.tokens.values[offsets[i] : offsets[i + 1]]) for i in ids]
    with torch.no_grad():
        theirs = baseline(*torch_models.pad(texts, None), images).numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-5)


def test_a_round_of_encoding(data):
    prepared = encode.prepare(list(encode.PROGRAMS), {**SETTINGS, "data": data})
    assert list(prepared) == list(encode.PROGRAMS)
    for about, run in prepared.values():
        assert about == {"texts": 20}
        assert np.isfinite(run()["sum"])


def test_a_round_of_images(monkeypatch):
    tiny = {"image_size": 16, "patch_size": 8, "num_layers": 1, "width": 16, "num_heads": 2,
            "mlp_width": 16}  # fmt: skip
    monkeypatch.setitem(vision.SIZES, "base", tiny)
    settings = {"tower": "base", "batch": 3, "threads": 1, "device": "cpu"}
    prepared = vision.prepare(list(vision.PROGRAMS), settings)
    assert list(prepared) == list(vision.PROGRAMS)
    for about, run in prepared.values():
        assert about == {"images": 3} and np.isfinite(run()["sum"])


def test_programs_take_turns(monkeypatch, capsys):
    class Instant:
        def __init__(self, module, programs, settings, threads):
            self.about = {name: {"count": 6} for name in programs}

        def time(self, program):
            return {"seconds": {"ours": 2.0, "ours, other": 3.0, "torch": 4.0}[program]}

        def close(self):
            pass

    monkeypatch.setattr(workers, "Worker", Instant)
    names = ["ours", "ours, other", "torch"]
    said = workers.compare(
        "nowhere", names, [("ours", "torch"), ("ours", "absent")], {"threads": 1}, rounds=3,
        texts=lambda about: about["count"], unit="images",
    )  # fmt: skip
    assert [len(said[name]) for name in names] == [3, 3, 3]
    printed = capsys.readouterr().out
    assert "images/s" in printed and "ours : torch = 2.00 (2.00 to 2.00)" in printed
    assert [line.split()[-1] for line in printed.splitlines()[1:4]] == ["3.0", "2.0", "1.5"]


def test_full_texts_have_32_tokens(data):
    full = train_step.data_of({"data": data, "images": 0}, full=True)
    for items in (full.train, full.test, full.labels):
        assert set(np.diff(items.tokens.offsets)) == {32}
    plain = inputs.open_data(data)
    first = plain.train.tokens.values[: plain.train.tokens.offsets[1]]
    np.testing.assert_array_equal(full.train.tokens.values[:32], np.resize(first, 32))


def test_packing_counts_empty_positions(data):
    items = inputs.open_data(data).train
    found = packing.measure(items, batch=40, width=64, layout=packing_lib.Layout())
    lengths = np.diff(items.tokens.offsets)
    assert found["padded to 32, text only"][1] == pytest.approx(1 - lengths.sum() / (40 * 32))
    seconds, empty = found["packed"]
    assert seconds > 0 and 0 <= empty < 0.3
