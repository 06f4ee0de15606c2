"""Checks of the flags of a run against its data, made before anything is built or trained."""

import dataclasses

from vixml_jax import evaluator
from vixml_jax.config import Config
from vixml_jax.data import prepare_line
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import agreement
from vixml_jax.errors import InputError
from vixml_jax.runtime import console

VALID = 0.1  # Fraction for validation, in the commands that messages give.


def check_tokenizer(config: Config, dataset: PreparedDataset) -> None:
    """Checks that the data were tokenized for the pretrained model, if there is one.

    Raises:
      InputError: If they were not.
    """
    if config.model.pretrained:
        agreement.check(dataset, config.model.pretrained)


def with_metrics(config: Config, dataset: PreparedDataset) -> Config:
    """Returns the flags of a run with the metrics of `--eval.tune` that its data have.

    Raises:
      InputError: If a metric that a flag names cannot be computed on them.
    """
    k = min(config.eval.k, dataset.num_labels)
    _check_monitor(config, dataset, k)
    return _with_tuning(config, dataset, k)


def _check_monitor(config: Config, dataset: PreparedDataset, k: int) -> None:
    """Checks that `--loop.monitor` can be computed on the data.

    Raises:
      InputError: If there is no validation split or no such metric.
    """
    monitor = config.loop.monitor
    if not monitor:
        return
    if not dataset.valid:
        raise InputError(
            f"--loop.monitor={monitor}: --data={config.data} has no validation split; prepare it "
            f"with one: {prepare_line.again(dataset.info, dataset.path, valid=VALID)}"
        )
    evaluator.check_metric_names("loop.monitor", [monitor], k)


def _with_tuning(config: Config, dataset: PreparedDataset, k: int) -> Config:
    """Returns the flags with the metrics of `--eval.tune` that the data have.

    Data with fewer than 5 labels have no metrics at 5; these are left out, with a note.

    Raises:
      InputError: If there is no such metric, or none is left.
    """
    wanted = config.eval.tune
    if not wanted:
        return config
    if not dataset.valid:
        console.status(
            "note: --eval.tune has no effect, because the data have no validation split; to have "
            f"one: {prepare_line.again(dataset.info, dataset.path, valid=VALID)}"
        )
    usual = set(evaluator.metric_names(100))
    known = set(evaluator.metric_names(k))
    missing = [name for name in wanted if name not in known and name in usual]
    kept = [name for name in wanted if name not in missing]
    evaluator.check_metric_names("eval.tune", kept or wanted, k)
    if missing:
        console.status(
            f"note: --eval.tune={','.join(kept)} in place of {','.join(wanted)}: with {k} labels "
            f"per query there is no {', '.join(missing)}"
        )
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, tune=kept))
