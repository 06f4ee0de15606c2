"""Sizes that the mesh does not divide: padding, and training equal to that on one device."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests import host_devices
from tests.tiny import configuration, make_data, make_qwen
from vixml_jax import config as config_lib
from vixml_jax import frozen_weights, saved_model, train, workdir
from vixml_jax.config import LoraConfig
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.models import hf_export
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import sharding
from vixml_jax.structs import Batch, PackedItems, Positives, Shard
from vixml_jax.training import build
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.memory_planner import DataSizes

ROOT = pathlib.Path(__file__).parents[2]
# Axes of size 2 or 4 do not divide a vocabulary of 31 or a width of 21; an axis of size 4 does not
# divide 6 or 2 heads, or a width of 30.
ENCODER = BertConfig(
    vocab_size=31, num_layers=1, width=21, num_heads=3, mlp_width=30, max_positions=32,
    image_width=5,
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=31, num_layers=2, width=21, num_heads=6, num_kv_heads=2, head_width=6, mlp_width=30,
    qkv_bias=True, qk_norm=True, image_width=5, remat=False,
)  # fmt: skip
TOWERS = {
    "encoder": ENCODER,
    "encoder, scan": dataclasses.replace(ENCODER, scan=True),
    "decoder": dataclasses.replace(DECODER, scan=False),
    "decoder, scan": dataclasses.replace(DECODER, remat=True),
    "adapters": dataclasses.replace(DECODER, lora_rank=3, lora_alpha=6.0),
}
SIZES = DataSizes(queries=27, labels=21)
WIDTH, LENGTH, BATCH = 16, 4, 16  # Positions of a row and of an item; queries (and labels).


def settings(chunk):
    return config_lib.from_dict(
        {
            "model": {"num_images": 1, "image_init": "random"},
            "labels": {"num_free": 13, "num_heads": 3, "mlp_width": 30},
            "loss": {"num_negatives": 4},
            "batch": {"size": BATCH, "row_width": WIDTH, "microbatch_rows": chunk},
            "lora": {"base_dtype": "float32"},
            "optimizer": {
                "learning_rate": 3e-3, "label_learning_rate": 3e-3, "image_learning_rate": 3e-3,
                "warmup_steps": 1, "weight_decay": 0.3, "clip_norm": 0.1,
            },
        }
    )  # fmt: skip


def random_batch(seed):
    """Items of an image and three tokens; each row holds two queries and their labels."""
    rng = np.random.default_rng(seed)
    rows = 2 * BATCH * LENGTH // WIDTH
    image_ids = np.repeat(np.arange(2 * BATCH, dtype=np.int32), LENGTH).reshape(rows, WIDTH)
    items = np.arange(BATCH, dtype=np.int32).reshape(rows, 2)
    segments = np.repeat(np.concatenate([items, BATCH + items], axis=1), LENGTH, axis=1)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, WIDTH // LENGTH))
    query_ids = rng.permutation(SIZES.queries)[:BATCH].astype(np.int32)
    query_ids[-2:] = -1
    label_ids = rng.integers(0, SIZES.labels, BATCH).astype(np.int32)
    return Batch(
        PackedItems(
            tokens=rng.integers(0, 31, (rows, WIDTH)).astype(np.int32),
            segments=segments,
            positions=positions,
            image_at=np.where(positions == 0, image_ids, -1),
            images=rng.normal(size=(2 * BATCH, 5)).astype(np.float16),
        ),
        query_ids,
        label_ids,
        Positives(np.arange(BATCH, dtype=np.int32), np.where(query_ids < 0, -1, label_ids)),
    )


def trained(tower, sizes, chunk=0, steps=2):
    """State after some steps, scalars of each step, and description of the padding, on a mesh."""
    count = int(np.prod(sizes))
    mesh = sharding.create_mesh(*sizes, devices=jax.devices()[:count])
    config = settings(chunk)
    parts = build.assemble(config, tower, Layout(1), SIZES, mesh)
    params, frozen = frozen_weights.split(build.initial_params(config, parts.model, None), tower)
    labels = parts.model.table.init_state(np.arange(SIZES.labels) % 13)
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(SIZES.labels, 21)).astype(np.float32)
    labels = parts.model.table.with_centroids(labels, Shard(np.arange(SIZES.labels), centroids))
    bank = state_lib.empty_bank(parts.model, SIZES.queries)
    state = state_lib.place_state(parts.like, params, frozen, parts.optimizer, labels, bank)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, parts.like)
    jax.block_until_ready(state)
    scalars, key = [], jax.random.key(5)
    for seed in range(steps):
        batch = sharding.to_devices(random_batch(seed), mesh)
        state, step_scalars = parts.step(state, batch, key)
        scalars.append(jax.device_get(step_scalars))
    tables = state_lib.abstract_tables(parts.model, SIZES.queries)
    padding = sharding.describe_padding({**parts.model.abstract_params, **tables}, mesh)
    return jax.device_get(state), scalars, padding


@functools.cache
def trained_on_one_device(name, chunk):
    state, scalars, padding = trained(TOWERS[name], (1, 1, 1), chunk)
    assert not padding
    return state, scalars


def assert_trains_as_on_one_device(name, sizes, chunk=0):
    expected_state, expected_scalars = trained_on_one_device(name, chunk)
    state, scalars, _ = trained(TOWERS[name], sizes, chunk)
    for expected, found in zip(expected_scalars, scalars, strict=True):
        for key in ("loss", "gradient_norm"):
            np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, err_msg=key)
    num_padded = 0
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected_state)
    for (path, expected), found in zip(expected_leaves, jax.tree.leaves(state), strict=True):
        name = jax.tree_util.keystr(path)
        unpadded = tuple(map(slice, expected.shape))
        # Weights, optimizer moments (and so gradients), and embeddings in the bank.
        np.testing.assert_allclose(found[unpadded], expected, rtol=2e-4, atol=2e-6, err_msg=name)
        padding = found.copy()
        padding[unpadded] = 0
        assert not padding.any(), name
        num_padded += found.shape != expected.shape
    assert num_padded


@pytest.mark.parametrize(
    "name,sizes,chunk",
    [
        ("encoder", (1, 2, 4), 0),
        pytest.param("adapters", (1, 2, 4), 1, marks=pytest.mark.slow),
    ],
)
def test_uneven_sizes_train_as_on_one_device(name, sizes, chunk):
    assert_trains_as_on_one_device(name, sizes, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (8, 1, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_uneven_sizes_train_as_on_one_device_on_every_mesh(name, sizes):
    assert_trains_as_on_one_device(name, sizes)


def padding_lines(tower, sizes):
    mesh = sharding.create_mesh(*sizes)
    model = build.assemble(settings(0), tower, Layout(1), SIZES, mesh).model
    tables = state_lib.abstract_tables(model, SIZES.queries)
    return sharding.describe_padding({**model.abstract_params, **tables}, mesh)


def test_each_padded_dimension_is_described_once():
    lines = padding_lines(DECODER, (1, 2, 4))
    dimensions = [line.split(", in ")[0].removeprefix("padded: ") for line in lines]
    assert sorted(dimensions) == [
        "embed from 21 to 22, a multiple of fsdp:2",
        "heads from 3 to 4, a multiple of tensor:4",  # Of the combiner.
        "heads from 6 to 8, a multiple of tensor:4",
        "kv_heads from 2 to 4, a multiple of tensor:4",
        "label from 13 to 14, a multiple of replica:1 x fsdp:2",
        "label from 21 to 22, a multiple of replica:1 x fsdp:2",
        "label from 27 to 28, a multiple of replica:1 x fsdp:2",
        "mlp from 30 to 32, a multiple of tensor:4",
        "vocab from 31 to 32, a multiple of tensor:4",
    ]
    (vocabulary,) = (line for line in lines if "vocab" in line)
    assert vocabulary.endswith(", in tower/word_embeddings")
    (embeddings,) = (line for line in lines if "label from 27" in line)
    assert embeddings.endswith(", in bank")


def test_arrays_without_padding_are_not_sliced():
    """Without padding the program has as many slices as on one device."""
    even = dataclasses.replace(ENCODER, vocab_size=32, width=16, num_heads=2, mlp_width=32)

    def program(sizes):
        mesh = sharding.create_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        model = build.assemble(settings(0), even, Layout(1), SIZES, mesh).model
        like = sharding.stored_tree(model.abstract_params, mesh)
        packed = sharding.abstract_on_devices(random_batch(0).items, mesh)
        return jax.jit(lambda p, x: model.tower_vectors(p, x, 32)).lower(like, packed).as_text()

    assert program((1, 4, 2)).count("slice") == program((1, 1, 1)).count("slice")
    assert program((1, 1, 8)).count("slice") > program((1, 1, 1)).count(
        "slice"
    )  # Two heads are padded to eight.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A Qwen2.5 whose sizes a mesh of eight devices does not divide."""
    return make_qwen(
        tmp_path_factory.mktemp("qwen"),
        vocab_size=PreparedDataset.open(data).vocab_size + 4,
        hidden_size=12,
        intermediate_size=18,
        num_attention_heads=3,
    )


@pytest.fixture(scope="module")
def run(data, checkpoint, tmp_path_factory):
    """A run on two by four devices, whose image projection starts from a regression."""
    config = configuration(data, tmp_path_factory.mktemp("runs") / "uneven")
    config = dataclasses.replace(
        config,
        mesh="fsdp:2,tensor:4",
        model=dataclasses.replace(config.model, pretrained=checkpoint, scan=True),
        lora=LoraConfig(rank=2, alpha=4.0, base_dtype="float32"),
        batch=dataclasses.replace(config.batch, row_width=24, cluster_start=-1),
        loop=dataclasses.replace(config.loop, epochs=1),
    )
    train.train(config)
    return config


def opened(config, mesh):
    tower, layout = workdir.read_tower(config.workdir)
    return workdir.build_model(config, tower, layout, 20, mesh)


def test_initial_image_projection_is_the_same_on_any_mesh(run):
    dataset, projections = PreparedDataset.open(run.data), []
    for mesh in (workdir.make_mesh(run), sharding.create_mesh(devices=jax.devices()[:1])):
        params = build.initial_params(run, opened(run, mesh), dataset)
        projections.append(jax.device_get(params["tower"]["image_projection"]))
    sharded, expected = projections
    assert sharded["kernel"].shape == expected["kernel"].shape == (12, 12)
    for name in expected:
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(sharded[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_run_is_restored_on_another_mesh(run, tmp_path):
    dataset, vectors, directories = PreparedDataset.open(run.data), [], []
    for mesh in (workdir.make_mesh(run), sharding.create_mesh()):
        model = opened(run, mesh)
        params, labels, _ = saved_model.restore(run.workdir, model)
        vectors.append(model.encode_labels(params, labels, dataset.labels, block=32).values)
        directories.append(str(tmp_path / str(len(directories))))
        hf_export.save_hf_tower(
            directories[-1], params["tower"], config=model.tower.config, like=run.model.pretrained
        )
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    first, second = (
        safetensors.load_file(os.path.join(x, "model.safetensors")) for x in directories
    )
    assert first.keys() == second.keys()
    assert first["layers.0.self_attn.k_proj.weight"].shape == (4, 12)
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value)
    # With an fsdp axis of size 8 the width of 12 is padded to 16.
    assert params["tower"]["encoder"]["blocks"]["key"]["kernel"].shape == (2, 16, 1, 4)


def test_evaluate_on_fewer_devices_than_trained(run):
    """On one device the mesh of the run is refused with a message, and another one works."""
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={run.workdir}"]
    one_device = host_devices.environment(1)
    for flags, status in (([], 2), (["--mesh=fsdp:-1"], 0)):
        done = subprocess.run([*command, *flags], env=one_device, capture_output=True, text=True,
                              cwd=ROOT, check=False)  # fmt: skip
        assert done.returncode == status, done.stderr
    assert "test: 30 queries, 20 labels" in done.stdout
