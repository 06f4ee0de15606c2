"""Sizes that no mesh divides: stored padded, used as they are, trained as on one device."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests.tiny import configuration, make_data, make_qwen
from vixml_jax import config as config_lib
from vixml_jax import train, workdir
from vixml_jax.config import LoraConfig
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import sharding
from vixml_jax.structs import Batch, PackedItems, Share
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.memory_planner import DataSizes

ROOT = pathlib.Path(__file__).parents[2]
# Neither two devices nor four divide 31 words or width 21; nor four 6 and 2 heads, or 30.
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
WIDTH, LENGTH, BATCH = 16, 4, 16  # Positions of a row and of an item; items of either side.


def settings(chunk):
    return config_lib.from_dict(
        {
            "model": {"num_images": 1, "image_init": "random"},
            "labels": {"num_free": 13, "num_heads": 3, "mlp_width": 30},
            "loss": {"num_negatives": 4},
            "batch": {"size": BATCH, "row_width": WIDTH, "encode_chunk": chunk},
            "lora": {"base_dtype": "float32"},
            "optimizer": {
                "learning_rate": 3e-3, "label_learning_rate": 3e-3, "image_learning_rate": 3e-3,
                "warmup_steps": 1, "weight_decay": 0.3, "clip_norm": 0.1,
            },
        }
    )  # fmt: skip


def random_batch(seed):
    """A picture, then three words an item; two queries and their labels a row."""
    rng = np.random.default_rng(seed)
    rows = 2 * BATCH * LENGTH // WIDTH
    places = np.repeat(np.arange(2 * BATCH, dtype=np.int32), LENGTH).reshape(rows, WIDTH)
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
            image_at=np.where(positions == 0, places, -1),
            images=rng.normal(size=(2 * BATCH, 5)).astype(np.float16),
        ),
        query_ids,
        label_ids,
        (label_ids[:, None] == label_ids[None, :]) & (query_ids >= 0)[:, None],
    )


def trained(tower, sizes, chunk=0, steps=2):
    """(the state after some steps, its scalars, the padding that was told) on a mesh."""
    count = int(np.prod(sizes))
    mesh = sharding.create_mesh(*sizes, devices=jax.devices()[:count])
    config = settings(chunk)
    parts = train.assemble(config, tower, Layout(1), SIZES, mesh)
    params, frozen = workdir.split_params(train.first_params(config, parts.model, None), tower)
    labels = parts.model.table.init_state(np.arange(SIZES.labels) % 13)
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(SIZES.labels, 21)).astype(np.float32)
    labels = parts.model.table.with_centroids(labels, Share(np.arange(SIZES.labels), centroids))
    bank = state_lib.empty_bank(parts.model, SIZES.queries)
    state = state_lib.place_state(parts.like, params, frozen, parts.optimizer, labels, bank)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, parts.like)
    jax.block_until_ready(state)
    scalars, key = [], jax.random.key(5)
    for seed in range(steps):
        batch = sharding.to_devices(random_batch(seed), mesh)
        state, found = parts.step(state, batch, key)
        scalars.append(jax.device_get(found))
    tables = state_lib.abstract_tables(parts.model, SIZES.queries)
    said = sharding.describe_padding({**parts.model.abstract_params, **tables}, mesh)
    return jax.device_get(state), scalars, said


ALONE = {}


def alone(name, chunk):
    if (name, chunk) not in ALONE:
        state, scalars, said = trained(TOWERS[name], (1, 1, 1), chunk)
        assert not said  # One device pads nothing.
        ALONE[name, chunk] = state, scalars
    return ALONE[name, chunk]


def assert_trains_alike(name, sizes, chunk=0):
    expected, expected_scalars = alone(name, chunk)
    state, scalars, said = trained(TOWERS[name], sizes, chunk)
    for one, other in zip(expected_scalars, scalars, strict=True):
        for key in ("loss", "gradient_norm"):
            np.testing.assert_allclose(other[key], one[key], rtol=2e-5, err_msg=key)
    longer = 0
    expected = jax.tree_util.tree_leaves_with_path(expected)
    for (path, one), found in zip(expected, jax.tree.leaves(state), strict=True):
        where = jax.tree_util.keystr(path)
        real = tuple(map(slice, one.shape))
        # Weights, moments (so gradients), and the embeddings that the bank was given.
        np.testing.assert_allclose(found[real], one, rtol=2e-4, atol=2e-6, err_msg=where)
        rest = found.copy()
        rest[real] = 0
        assert not rest.any(), where
        longer += found.shape != one.shape
    assert longer
    return said


@pytest.mark.parametrize(
    "name,sizes,chunk",
    [
        ("encoder", (1, 2, 4), 0),
        ("adapters", (1, 2, 4), 1),
    ],
)
def test_uneven_sizes_train_as_on_one_device(name, sizes, chunk):
    assert_trains_alike(name, sizes, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (8, 1, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_uneven_sizes_train_as_on_one_device_everywhere(name, sizes):
    assert_trains_alike(name, sizes)


def padding(tower, sizes):
    mesh = sharding.create_mesh(*sizes)
    model = train.assemble(settings(0), tower, Layout(1), SIZES, mesh).model
    tables = state_lib.abstract_tables(model, SIZES.queries)
    return sharding.describe_padding({**model.abstract_params, **tables}, mesh)


def test_every_padded_dimension_is_told_once():
    told = padding(DECODER, (1, 2, 4))
    short = [line.split(", in ")[0].removeprefix("padded: ") for line in told]
    assert sorted(short) == [
        "embed from 21 to 22, a multiple of fsdp:2",
        "heads from 3 to 4, a multiple of tensor:4",  # The combiner's.
        "heads from 6 to 8, a multiple of tensor:4",
        "kv_heads from 2 to 4, a multiple of tensor:4",
        "label from 13 to 14, a multiple of replica:1 x fsdp:2",
        "label from 21 to 22, a multiple of replica:1 x fsdp:2",
        "label from 27 to 28, a multiple of replica:1 x fsdp:2",
        "mlp from 30 to 32, a multiple of tensor:4",
        "vocab from 31 to 32, a multiple of tensor:4",
    ]
    (vocabulary,) = (line for line in told if "vocab" in line)
    assert vocabulary.endswith(", in tower/word_embeddings")
    (embeddings,) = (line for line in told if "label from 27" in line)
    assert embeddings.endswith(", in bank")


def test_what_fits_is_not_cut():
    """Where nothing is padded the step has no slice that one device has not."""
    even = dataclasses.replace(ENCODER, vocab_size=32, width=16, num_heads=2, mlp_width=32)

    def program(sizes):
        mesh = sharding.create_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        model = train.assemble(settings(0), even, Layout(1), SIZES, mesh).model
        like = sharding.stored_tree(model.abstract_params, mesh)
        packed = sharding.abstract_on_devices(random_batch(0).items, mesh)
        return jax.jit(lambda p, x: model.tower_vectors(p, x, 32)).lower(like, packed).as_text()

    assert program((1, 4, 2)).count("slice") == program((1, 1, 1)).count("slice")
    assert program((1, 1, 8)).count("slice") > program((1, 1, 1)).count("slice")  # Two heads.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A Qwen2.5 that eight devices share unevenly."""
    return make_qwen(
        tmp_path_factory.mktemp("qwen"),
        vocab_size=PreparedDataset.open(data).vocab_size + 4,
        hidden_size=12,
        intermediate_size=18,
        num_attention_heads=3,
    )


@pytest.fixture(scope="module")
def run(data, checkpoint, tmp_path_factory):
    """A run over two by four devices, pictures started from their regression."""
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


def test_pictures_start_alike_on_any_mesh(run):
    dataset, found = PreparedDataset.open(run.data), []
    for mesh in (workdir.make_mesh(run), sharding.create_mesh(devices=jax.devices()[:1])):
        params = train.first_params(run, opened(run, mesh), dataset)
        found.append(jax.device_get(params["tower"]["image_projection"]))
    spread, one = found
    assert spread["kernel"].shape == one["kernel"].shape == (12, 12)
    for name in one:
        assert np.abs(one[name]).max() > 0
        np.testing.assert_allclose(spread[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_run_is_read_back_on_another_mesh(run, tmp_path):
    dataset, vectors, names = PreparedDataset.open(run.data), [], []
    for mesh in (workdir.make_mesh(run), sharding.create_mesh()):
        model = opened(run, mesh)
        params, labels, _ = workdir.restore_model(run.workdir, model)
        share = model.encode_labels(params, labels, dataset.labels, block=32)
        vectors.append(share.values)
        names.append(str(tmp_path / str(len(names))))
        hf_checkpoints.save_hf_tower(
            names[-1], params["tower"], config=model.tower.config, like=run.model.pretrained
        )
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    one, other = (safetensors.load_file(os.path.join(x, "model.safetensors")) for x in names)
    assert one.keys() == other.keys() and one["layers.0.self_attn.k_proj.weight"].shape == (4, 12)
    for key, value in one.items():
        np.testing.assert_array_equal(other[key], value)
    # Of eight devices along fsdp each has two of sixteen, the real twelve and zeros.
    assert params["tower"]["encoder"]["blocks"]["key"]["kernel"].shape == (2, 16, 1, 4)


def test_evaluate_on_fewer_devices_than_trained(run):
    """One device: the mesh of the run is refused in a line, another one serves."""
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={run.workdir}"]
    alone = {**os.environ, "XLA_FLAGS": ""}
    for flags, status in (([], 2), (["--mesh=fsdp:-1"], 0)):
        done = subprocess.run([*command, *flags], env=alone, capture_output=True, text=True,
                              cwd=ROOT, check=False)  # fmt: skip
        assert done.returncode == status, done.stderr
    assert "test: 30 queries, 20 labels" in done.stdout
