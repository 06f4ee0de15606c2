"""Training of a decoder: adapters of a frozen base, prompts, images, resuming, evaluation."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from tests.tiny import assert_same_state, configuration, final_state, make_data, make_qwen
from vixml_jax import config as config_lib
from vixml_jax import evaluate, frozen_weights, saved_model, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.config import LoraConfig, PromptConfig
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.runtime import tree_utils
from vixml_jax.training import build, optimizer
from vixml_jax.training import train_state as state_lib


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A tiny Qwen2.5 with embeddings for the tokens of the data."""
    return make_qwen(
        tmp_path_factory.mktemp("qwen"),
        vocab_size=PreparedDataset.open(data).vocab_size + 3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
    )


def decoder_run(data, checkpoint, workdir, **changes):
    config = configuration(data, workdir)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pretrained=checkpoint, scan=True, remat=True),
        prompt=PromptConfig(text="a1", images="b1"),
        lora=LoraConfig(rank=2, alpha=4.0, maps=["query", "value", "down"]),
        batch=dataclasses.replace(config.batch, row_width=24, microbatch_rows=1, image_dropout=0.2),
        loop=dataclasses.replace(config.loop, epochs=2),
        knn=dataclasses.replace(config.knn, weight=0.1),
        **changes,
    )


@pytest.fixture(scope="module")
def finished_run(data, checkpoint, tmp_path_factory):
    config = decoder_run(data, checkpoint, tmp_path_factory.mktemp("run") / "finished")
    train.train(config)
    return config


def test_base_is_frozen_and_saved_once(finished_run, checkpoint):
    tower, layout = workdir_lib.read_tower(finished_run.workdir)
    assert (tower.lora_rank, tower.lora_maps) == (2, ("query", "value", "down"))
    assert layout.seen[-1] == layout.unseen[-1] and "images" in layout.seen
    model = workdir_lib.build_model(
        finished_run, tower, layout, 20, workdir_lib.make_mesh(finished_run)
    )
    params, _, _ = saved_model.restore(finished_run.workdir, model)
    _, base = hf_checkpoints.load_hf_tower(checkpoint, dtype="bfloat16")
    trained, frozen = frozen_weights.split(params, tower)
    jax.tree.map(np.testing.assert_array_equal, frozen, {"tower": base})
    adapters = [path for path in tree_utils.paths(trained["tower"]) if path[-1].startswith("lora")]
    assert {path[-2] for path in adapters} == {"query", "value", "down"}
    changed = trained["tower"]["encoder"]["blocks"]["query"]["lora_b"]
    assert np.abs(changed).max() > 0 and changed.dtype == np.float32
    # Checkpoints contain neither frozen weights nor optimizer moments of them.
    saved = [name for name in final_state(finished_run) if "blocks" in name or "word_emb" in name]
    assert saved and all("lora_" in name for name in saved)


def test_weights_that_were_read_are_never_copied(data, checkpoint, tmp_path, monkeypatch):
    config = decoder_run(data, checkpoint, tmp_path / "run")
    dataset, mesh = workdir_lib.open_dataset(config), workdir_lib.make_mesh(config)
    tower, layout = build.make_tower(config, dataset)
    model = workdir_lib.build_model(config, tower, layout, dataset.num_labels, mesh)
    read, load = [], hf_checkpoints.load_hf_tower
    monkeypatch.setattr(
        hf_checkpoints, "load_hf_tower", lambda *a, **k: read.append(load(*a, **k)) or read[0]
    )
    params = build.initial_params(config, model, dataset)
    params, frozen = frozen_weights.split(params, tower)
    tx = optimizer.make_optimizer(total_steps=1, **dataclasses.asdict(config.optimizer))
    split = frozen_weights.split(model.abstract_params, tower)
    like = state_lib.abstract_state(model, *split, tx, len(dataset.train))
    labels = model.table.init_state(np.zeros(dataset.num_labels, np.int32))
    bank = state_lib.empty_bank(model, len(dataset.train))
    state = state_lib.place_state(like, params, frozen, tx, labels, bank)

    def addresses(x):
        return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]

    as_read, in_state = (jax.tree.map(addresses, x) for x in (read[0][1], state.frozen["tower"]))
    assert as_read == in_state


def test_interrupted_run_resumes_bit_for_bit(data, checkpoint, finished_run, tmp_path, monkeypatch):
    config = decoder_run(data, checkpoint, tmp_path / "run")
    advance = train.MetricLogger.advance
    seen = []

    def stop(self, epoch):
        seen.append(epoch)
        if len(seen) == 8:
            raise KeyboardInterrupt
        advance(self, epoch)

    monkeypatch.setattr(train.MetricLogger, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    train.train(config)
    assert_same_state(final_state(finished_run), final_state(config))


def test_evaluate_needs_only_the_run_directory(finished_run, capsys):
    path = os.path.join(finished_run.workdir, "evaluation", "test-exact.json")
    with open(path) as file:
        trained = json.load(file)
    config = config_lib.load(os.path.join(finished_run.workdir, workdir_lib.CONFIG))
    assert config == finished_run
    dataset = workdir_lib.open_dataset(config)
    model = workdir_lib.build_model(
        config,
        *workdir_lib.read_tower(config.workdir),
        dataset.num_labels,
        workdir_lib.make_mesh(config),
    )
    params, labels, step = saved_model.restore(config.workdir, model)
    evaluate.show(
        config,
        model,
        params,
        labels,
        dataset,
        split="test",
        search="exact",
        step=step,
        scoring=settings_lib.as_trained(config),
    )
    with open(path) as file:
        again = json.load(file)
    assert again["with_neighbours"] == trained["with_neighbours"] != again["P@1"]
    assert again["P@5"] == trained["P@5"]
    assert "this run, text and images, with neighbours" in capsys.readouterr().out


@pytest.mark.slow
def test_decoder_from_scratch_learns(data, tmp_path):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, family="decoder", pooling="last", width=32, mlp_width=64, scan=True
        ),
        batch=dataclasses.replace(config.batch, row_width=24, cluster_start=-1),
        loop=dataclasses.replace(config.loop, epochs=12),
    )
    train.train(config)
    with open(os.path.join(config.workdir, "evaluation", "test-exact.json")) as file:
        assert json.load(file)["P@1"] > 60  # A random order gives 10.


@pytest.mark.parametrize("changes,message", [
    ({"lora": LoraConfig(rank=2)}, "--lora.rank=2: adapters need pretrained weights"),
    ({"lora": LoraConfig(rank=2, maps=["query", "values"])}, r"unknown lora_maps \['values'\]"),
    ({"model": {"family": "decoder", "pooling": "cls"}}, "--model.pooling=cls: the first token"),
    ({"model": {"family": "decoder"}, "batch": {"row_width": 10}}, "row_width=10 is too narrow"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_rejected(changes, message, data, checkpoint, tmp_path):
    config = configuration(data, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        for name, value in changes.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(config, name), **value)
            elif "unknown" in message:
                model = dataclasses.replace(config.model, pretrained=checkpoint)
                config = dataclasses.replace(config, model=model)
            config = dataclasses.replace(config, **{name: value})
        train.train(config)
    assert not os.path.exists(config.workdir)
