"""`--model.pooling`: what the checkpoint says, what the flag says, and what a run records."""

import dataclasses
import json

import pytest

from tests import random_models, tiny
from vixml_jax import workdir
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.training import build


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PreparedDataset.open(tiny.make_data(tmp_path_factory.mktemp("data")))


def save(path, family, dataset, **settings):
    """A tiny checkpoint with the vocabulary of the data."""
    vocab_size = dataset.vocab_size
    model = random_models.text_model(family, vocab_size=vocab_size, **settings)
    model.save_pretrained(path)


def save_modules(path, **pooling):
    """Makes a sentence-transformers directory of it."""
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    listed = [{"path": p, "type": f"sentence_transformers.models.{kinds[p]}"} for p in kinds]
    (path / "modules.json").write_text(json.dumps(listed))


def flags(path, dataset, **model):
    config = tiny.configuration(dataset.path, path / "run")
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, pretrained=str(path), **model)
    )


@pytest.mark.parametrize("flag,expected", [("auto", "cls"), ("mean", "mean"), ("last", "last")])
def test_an_encoder_is_pooled_as_its_files_or_the_flag_say(
    flag, expected, dataset, tmp_path, capsys
):
    save(tmp_path, "modernbert", dataset)
    save_modules(tmp_path, pooling_mode_cls_token=True)
    tower, _ = build.make_tower(flags(tmp_path, dataset, pooling=flag), dataset)
    assert tower.pooling == expected
    assert ("modules.json: cls pooling" in capsys.readouterr().out) == (flag == "auto")


def test_a_run_records_its_pooling_whatever_the_flag_was(dataset, tmp_path):
    save(tmp_path, "modernbert", dataset)
    save_modules(tmp_path, pooling_mode_cls_token=True)
    mesh = sharding.create_mesh()
    config = flags(tmp_path, dataset)

    def start(config):
        tower, layout = build.make_tower(config, dataset)
        workdir.open_run(config, tower, layout, "content", mesh)
        return tower, layout

    assert start(config) == workdir.read_tower(config.workdir)
    start(flags(tmp_path, dataset, pooling="cls"))  # The same, said explicitly.
    with pytest.raises(InputError, match=r"model\.pooling: was cls, now mean"):
        start(flags(tmp_path, dataset, pooling="mean"))


@pytest.mark.parametrize("model,settings,message", [
    ({}, {}, "the first token of a causal decoder sees no text"),
    ({"causal": False}, {}, None),
    ({"pooling": "last"}, {"is_causal": False}, "add --model.causal=false"),
    ({"pooling": "last", "causal": False}, {"is_causal": False}, None),
])  # fmt: skip
def test_decoders_that_attend_one_way_or_both(model, settings, message, dataset, tmp_path):
    save(tmp_path, "qwen2", dataset)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, **settings}))
    save_modules(tmp_path, pooling_mode="cls")
    config = flags(tmp_path, dataset, **model)
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, row_width=24))
    if message is None:
        assert not build.make_tower(config, dataset)[0].causal
    else:
        with pytest.raises(InputError, match=message):
            build.make_tower(config, dataset)
