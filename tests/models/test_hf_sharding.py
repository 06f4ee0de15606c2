"""Loading of checkpoints onto eight devices: each shard read once, one tensor at a time."""

import threading
import weakref

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import torch as safetensors

from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints, hf_files
from vixml_jax.models.siglip import VisionTower
from vixml_jax.models.tower import Tower
from vixml_jax.parallel import sharding

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8)
MODELS = {
    # The vocabulary of 50 is padded for a tensor axis of size 4 or 8.
    "bert": (
        transformers.BertModel,
        transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **SIZES),
    ),
    # Two key heads: with a tensor axis of size 8, six devices hold only padding.
    "qwen2": (
        transformers.Qwen2Model,
        transformers.Qwen2Config(vocab_size=64, num_key_value_heads=2, **SIZES),
    ),
    "siglip": (
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(image_size=16, patch_size=8, **SIZES),
    ),
}
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (8, 1, 1)]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """Family, path of a checkpoint of several files, and its float32 parameters on one device."""
    model, config = MODELS[request.param]
    torch.manual_seed(0)
    model, path = model(config), tmp_path_factory.mktemp(request.param)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape))
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return request.param, str(path), load(request.param, str(path))[1]


def load(family, path, **settings):
    loader = hf_checkpoints.load_hf_vision if family == "siglip" else hf_checkpoints.load_hf_tower
    return loader(path, **settings)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_sharded_by_their_axes(sizes, dtype, checkpoint, pack):
    family, path, plain = checkpoint
    mesh = sharding.create_mesh(*sizes)
    config, params = load(family, path, dtype=dtype, mesh=mesh)
    key = jax.random.key(0)
    abstract = jax.eval_shape(
        lambda: (
            VisionTower(config).init(key, np.zeros((1, 16, 16, 3)))
            if family == "siglip"
            else Tower(config).init(key, pack([([1], [])], [[0]], width=2), 1, deterministic=True)
        )
    )
    stored = sharding.stored_tree(abstract["params"], mesh)
    expected = jax.tree.map(lambda x: (x.shape, x.sharding), stored)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), params) == expected
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}

    def check(found, real):
        expected = np.zeros(found.shape, dtype)
        expected[tuple(map(slice, real.shape))] = np.asarray(real).astype(dtype)
        np.testing.assert_array_equal(np.asarray(found), expected)

    jax.tree.map(check, params, plain)
    if sizes == (1, 1, 8) and family != "siglip":
        rows = params["word_embeddings"].shape[0]
        assert rows == {"bert": 56, "qwen2": 64}[family]
        heads = params["encoder"]["blocks"]["key"]["kernel"].shape[2]
        assert heads == 8  # Two for Qwen2, without padding.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_cast_on_the_devices(dtype, tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen2Model(MODELS["qwen2"][1]).to(dtype)
    model.save_pretrained(tmp_path)
    _, params = hf_checkpoints.load_hf_tower(str(tmp_path), mesh=sharding.create_mesh(1, 4, 2))
    for i, layer in enumerate(model.layers):
        found = params["encoder"]["blocks"]["gate"]["kernel"][i]
        expected = layer.mlp.gate_proj.weight.detach().float().numpy().T
        np.testing.assert_array_equal(found, expected)


class LoggedTensor:
    """A lazy slice that logs what is read from it."""

    def __init__(self, name, tensor, log):
        self.name, self.tensor, self.log = name, tensor, log

    def get_shape(self):
        return self.tensor.get_shape()

    def get_dtype(self):
        return self.tensor.get_dtype()

    def __getitem__(self, index):
        self.log.append(self.name, found := self.tensor[index])
        return found


class Log:
    """Sizes of the parts read, and the bytes of them that are still referenced."""

    def __init__(self):
        self.read, self.held, self.most_held = [], 0, 0
        self._lock = threading.Lock()

    def append(self, name, part):
        self.read.append((name, part.nbytes))
        self._count(part.nbytes)
        weakref.finalize(part, self._count, -part.nbytes)

    def _count(self, change):
        with self._lock:
            self.held += change
            self.most_held = max(self.most_held, self.held)


@pytest.fixture
def log(monkeypatch):
    log, tensors = Log(), hf_files.tensors
    monkeypatch.setattr(
        hf_files,
        "tensors",
        lambda path: (
            tensor._replace(values=LoggedTensor(tensor.name, tensor.values, log))
            for tensor in tensors(path)
        ),
    )
    return log


def test_each_device_reads_its_own_shard_once(checkpoint, log):
    family, path, plain = checkpoint
    load(family, path, mesh=sharding.create_mesh(1, 8, 1))
    sizes = {}
    for name, size in log.read:
        sizes.setdefault(name, []).append(size)
    assert sum(map(sum, sizes.values())) == sum(x.nbytes for x in jax.tree.leaves(plain))
    for name, parts in sizes.items():
        assert len(set(parts)) == 1, name
        if "mlp" in name and name.endswith("weight"):
            assert len(parts) == 8, name


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_the_host_holds_one_tensor_at_a_time(sizes, checkpoint, log):
    family, path, _ = checkpoint
    mesh = None if sizes is None else sharding.create_mesh(*sizes)
    load(family, path, mesh=mesh)
    tensor_sizes = {}
    for name, size in log.read:
        tensor_sizes[name] = tensor_sizes.get(name, 0) + size
    assert 0 < log.most_held <= max(tensor_sizes.values())


def test_nothing_is_read_if_names_or_shapes_mismatch(tmp_path, log):
    model = transformers.Qwen2Model(MODELS["qwen2"][1])
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["norm.weight"]
    state["layers.2.mlp.up_proj.weight"] = torch.zeros(48, 31)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(tmp_path), mesh=sharding.create_mesh())
    assert "norm.weight is missing" in str(error.value)
    assert "up_proj.weight has shape [48, 31], expected [48, 32]" in str(error.value)
    assert not log.read
