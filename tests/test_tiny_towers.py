"""A tiny decoder with adapters and a tiny SigLIP, from image files to metrics.

Both have random weights, saved as Hugging Face models. The commands `prepare` and `train` use the
images, and the decoder then predicts better than from texts alone.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from tests import tiny
from vixml_jax.data.sources import glyphs
from vixml_jax.data.store import PreparedDataset

ROOT = pathlib.Path(__file__).parents[1]
WIDTH = 192


def write_decoder(path, vocab_size):
    """Writes a random Qwen3 whose token embeddings have unit variance, as in trained models."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4)
    model = transformers.Qwen3Model(
        transformers.Qwen3Config(vocab_size=vocab_size, **sizes, **heads)
    )
    with torch.no_grad():
        model.embed_tokens.weight.mul_(WIDTH**0.5)
    model.save_pretrained(path)


def write_items(path, prefix, items, relevance):
    """Writes one split in the format of the XML repository, with its images as PNG files."""
    from PIL import Image

    texts = [text for chunk in items.read_texts() for text in chunk]
    (path / f"{prefix}.raw.txt").write_text("".join(f"{text}\n" for text in texts))
    if relevance is None:
        return
    rows = np.split(relevance.indices, relevance.indptr[1:-1])
    lines = [" ".join(f"{label}:1" for label in row) for row in rows]
    sizes = " ".join(map(str, relevance.shape))
    (path / f"{prefix}_X_Y.txt").write_text("\n".join([sizes, *lines, ""]))
    names = []
    for n, (item_images, present) in enumerate(
        zip(items.images.embeddings, items.images.present, strict=True)
    ):
        files = [f"png/{prefix}{n}_{slot}.png" for slot in np.flatnonzero(present)]
        for file, image in zip(files, item_images[present], strict=True):
            grey = np.clip(128 + 512 * image.astype(np.float32), 0, 255).astype(np.uint8)
            Image.fromarray(grey.reshape(glyphs.SIDE, glyphs.SIDE)).save(path / file)
        names.append("\t".join(files))
    (path / f"{prefix}_images.txt").write_text("\n".join([*names, ""]))


def run(name, *flags):
    """Runs a command on one device."""
    command = [sys.executable, "-m", f"vixml_jax.{name}", *flags]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, check=True, env=one_device)


def precision(workdir):
    return json.loads((workdir / "evaluation" / "test-exact.json").read_text())["P@1"]


@pytest.mark.slow
def test_decoder_with_images_beats_the_text_only_decoder(tmp_path):
    source, data, decoder = tmp_path / "glyphs", tmp_path / "data", tmp_path / "decoder"
    (source / "png").mkdir(parents=True)
    raw = glyphs.make()
    write_items(source, "trn", raw.train, raw.train_relevance)
    write_items(source, "tst", raw.test, raw.test_relevance)
    write_items(source, "lbl", raw.labels, None)
    tiny.make_siglip(tmp_path / "siglip", glyphs.SIDE, 4)
    images = f"--images={tmp_path / 'siglip'}"
    run("prepare", f"--source={source}", f"--out={data}", "--max_tokens=16", images)
    write_decoder(decoder, PreparedDataset.open(str(data)).vocab_size)
    results = {}
    for num_images in (3, 0):
        workdir = tmp_path / f"run{num_images}"
        flags = ["--flagfile=experiments/quickstart_decoder.flags", f"--data={data}"]
        adapters = [f"--model.pretrained={decoder}", "--lora.rank=64", "--lora.alpha=64"]
        # The scale of the adapters, 8, multiplies each update, so the learning rate is smaller.
        adapters += ["--optimizer.learning_rate=3e-5", "--loop.epochs=24"]
        run("train", *flags, *adapters, f"--model.num_images={num_images}", f"--workdir={workdir}")
        results[num_images] = precision(workdir)
    assert results[3] > results[0] + 5, results
