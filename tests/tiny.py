"""A tiny data set, tiny models and a tiny configuration for tests of whole commands."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np

from vixml_jax import config as config_lib
from vixml_jax import saved_model
from vixml_jax import workdir as workdir_lib
from vixml_jax.data import preprocessing
from vixml_jax.storage import digests, object_store


def saved(workdir):
    """The model of a run that evaluation would read now."""
    with saved_model.opened(str(workdir)) as found:
        return found


def make_data(root, *, train=90, **settings):
    """Prepares data in which queries "aK bJ" have the labels "label aK" and "label bJ".

    Every other query has an image.

    Args:
      root: Directory for source files and prepared data.
      train: Number of training queries.
      settings: Of `preprocessing.Settings`.

    Returns:
      Path of the prepared data.
    """
    rng = np.random.default_rng(0)
    words = [f"{stem}{n}" for stem in "ab" for n in "0123456789"]
    (root / "lbl.raw.txt").write_text("".join(f"label {word}\n" for word in words))
    for split, count in (("trn", train), ("tst", 30)):
        first, second = rng.integers(0, 10, count), rng.integers(0, 10, count)
        (root / f"{split}.raw.txt").write_text(
            "".join(f"a{a} b{b}\n" for a, b in zip(first, second, strict=True))
        )
        (root / f"{split}_X_Y.txt").write_text(
            f"{count} 20\n"
            + "".join(f"{a}:1 {10 + b}:1\n" for a, b in zip(first, second, strict=True))
        )
        np.save(root / f"{split}_image_embeddings.npy", np.eye(12)[first].astype(np.float16))
        np.save(root / f"{split}_has_image.npy", np.arange(count) % 2 == 0)
    out = root / "prepared"
    settings = preprocessing.Settings(max_tokens=8, **settings)
    preprocessing.prepare(preprocessing.read_source(str(root)), str(out), settings)
    return str(out)


def make_qwen(path, **sizes):
    """Writes a random Qwen2.5 of two layers with `transformers`; returns its path."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.Qwen2Model(
        transformers.Qwen2Config(
            num_hidden_layers=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=2,
            **sizes,
        )
    ).save_pretrained(path)
    return str(path)


def make_siglip(path, side, patch, width=192):
    """Writes a random SigLIP for square images of `side` pixels; returns its path."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2)
    config = transformers.SiglipVisionConfig(
        **sizes, num_attention_heads=6, image_size=side, patch_size=patch
    )
    transformers.SiglipVisionModel(config).save_pretrained(path)
    processor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side},
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


def configuration(data, workdir, **changes):
    """Returns the configuration of a tiny run: 3 epochs of 6 steps."""
    config = config_lib.from_dict(
        {
            "data": data,
            "workdir": str(workdir),
            "model": {
                "num_layers": 1,
                "width": 16,
                "num_heads": 2,
                "mlp_width": 32,
                "num_images": 1,
            },
            "labels": {"num_free": 7, "mlp_width": 32, "num_heads": 2},
            "loss": {"num_negatives": 4},
            "batch": {
                "size": 16,
                "row_width": 16,
                "cluster_start": 0,
                "cluster_every": 1,
                "cluster_size": 4,
                "curriculum": [1],
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "label_learning_rate": 3e-3,
                "image_learning_rate": 3e-3,
                "warmup_steps": 3,
            },
            "loop": {"epochs": 3, "save_every": 2, "log_every": 3},
            "eval": {"k": 10, "block": 32},
        }
    )
    return dataclasses.replace(config, **changes)


def run_command(name, *arguments, status=0):
    """Runs `python -m vixml_jax.NAME` and checks its exit status.

    Returns:
      Standard output if the status is 0, else standard error.
    """
    command = [sys.executable, "-m", f"vixml_jax.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def final_state(config):
    """Returns all arrays of the newest checkpoint by path, however many processes wrote it."""
    import orbax.checkpoint as ocp

    directory = os.path.join(config.workdir, workdir_lib.CHECKPOINTS)
    newest = os.path.join(object_store.absolute(directory), str(digests.steps(directory)[-1]))
    items = {}
    for item in ("model", "training"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = os.path.join(newest, item)
            tree = checkpointer.metadata(path).item_metadata.tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            items[item] = checkpointer.restore(path, restore_args=on_host)
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(expected, actual, **tolerance):
    """Checks that two results of `final_state` are equal, or close if a tolerance is given."""
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if tolerance:
            np.testing.assert_allclose(actual[name], value, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
