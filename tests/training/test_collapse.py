"""Collapse is reported under every loss, by what it is: queries whose vectors are all alike."""

import dataclasses
import functools

import jax
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax.training import build
from vixml_jax.training.metric_logger import CollapseGuard

FINE = {"loss_text": 0.5, "violators": 3.0, "query_similarity": 0.4}
ALIKE = {"loss_text": 0.5, "violators": 3.0, "query_similarity": 0.99}


def warnings(guard, steps):
    return [bool(guard.warning(scalars, step)) for step, scalars in enumerate(steps, 1)]


def test_steps_whose_queries_are_alike_are_reported_once_per_patience():
    guard = CollapseGuard(patience=3)
    found = warnings(guard, [FINE, ALIKE, ALIKE, FINE, ALIKE, ALIKE, ALIKE, ALIKE, ALIKE, ALIKE])
    assert [step for step, warned in enumerate(found, 1) if warned] == [7, 10]
    text = [guard.warning(ALIKE) for _ in range(3)][-1]
    assert text == (
        "warning: training seems to have collapsed: for 3 steps two queries of a batch had a mean "
        "cosine of 0.99; try a lower --optimizer.learning_rate or more --optimizer.warmup_steps"
    )


def test_warm_up_is_left_out():
    guard = CollapseGuard(patience=3, warmup_steps=5)
    assert warnings(guard, [ALIKE] * 8) == [False] * 7 + [True]


def test_margin_matters_for_a_triplet_loss_only():
    at_margin = {"loss_text": 0.1, "violators": 10.0, "query_similarity": 0.4}
    assert warnings(CollapseGuard(patience=2), [at_margin] * 4) == [False] * 4
    guard = CollapseGuard(margin=0.1, num_negatives=10, patience=2)
    assert warnings(guard, [at_margin] * 2) == [False, True]


@pytest.mark.parametrize(
    ("kind", "collapses"),
    [("triplet", True), ("decoupled_softmax", False),
     *(pytest.param(*each, marks=pytest.mark.slow)
       for each in (("triplet", False), ("decoupled_softmax", True)))],
)  # fmt: skip
def test_run_reports_collapse(kind, collapses, tmp_path, monkeypatch, capsys):
    """A tower that reads no words gives every query nearly the same vector."""
    initial_params = build.initial_params

    def without_words(*args):
        params = initial_params(*args)
        words = params["tower"]["word_embeddings"]
        params["tower"]["word_embeddings"] = jax.device_put(0.0 * words, words.sharding)
        return params

    if collapses:
        monkeypatch.setattr(build, "initial_params", without_words)
    monkeypatch.setattr(train, "CollapseGuard", functools.partial(CollapseGuard, patience=4))
    config = configuration(make_data(tmp_path), tmp_path / "run")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_images=0, dropout=0.0),
        loss=dataclasses.replace(config.loss, kind=kind),
        loop=dataclasses.replace(config.loop, epochs=2),
    )
    if collapses:  # Words would soon be learnt.
        rates = dict.fromkeys(("learning_rate", "label_learning_rate", "image_learning_rate"), 0.0)
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, **rates)
        )
    train.train(config)
    assert ("seems to have collapsed" in capsys.readouterr().out) == collapses
