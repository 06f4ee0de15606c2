"""Tiny runs, trained once for the tests of this package; read only."""

import dataclasses

import pytest

from tests import tiny
from vixml_jax import train
from vixml_jax.serving.predictor import Predictor


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """A run with training neighbours."""
    root = tmp_path_factory.mktemp("run")
    config = tiny.configuration(tiny.make_data(root, train=120), root / "run")
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, epochs=1),
        knn=dataclasses.replace(config.knn, weight=0.2, k=5),
    )
    train.train(config)
    return config


@pytest.fixture(scope="package")
def predictor(run):
    return Predictor.load(run.workdir)


@pytest.fixture(scope="package")
def head_run(run, tmp_path_factory):
    """A run with training neighbours and a refitted label head."""
    config = dataclasses.replace(
        run,
        workdir=str(tmp_path_factory.mktemp("head") / "run"),
        head=dataclasses.replace(
            run.head, refit=True, epochs=4, batch_size=16, learning_rate=0.03, mlp_width=8, words=29
        ),
        fusion=dataclasses.replace(run.fusion, prototypes=4.0, head=1.5, frequency=0.4),
    )
    train.train(config)
    return config
