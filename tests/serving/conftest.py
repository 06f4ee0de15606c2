"""One tiny run with memory, trained once for all that answers from it; read, never changed."""

import dataclasses

import pytest

from tests import tiny
from vixml_jax import train
from vixml_jax.serving.predictor import Predictor


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = tiny.configuration(tiny.make_data(root, train=120), root / "run")
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, epochs=1),
        eval=dataclasses.replace(config.eval, memory_weight=0.2, memory_k=5),
    )
    train.train(config)
    return config


@pytest.fixture(scope="package")
def predictor(run):
    return Predictor.load(run.workdir)
