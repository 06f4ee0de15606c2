"""Opens the model and the serving artifacts of a run; writes artifacts that are missing."""

import os
from typing import Any

from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation.scored_search import ScoredSearch
from vixml_jax.config import Config
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed
from vixml_jax.runtime import console
from vixml_jax.serving import artifacts
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import LabelState


def open_run(
    config: Config, step: int, with_train: bool, cache: str
) -> tuple[Model, Any, LabelState, ServingArtifacts]:
    """Returns the model, its parameters and label state, and the serving artifacts of a run.

    Artifacts that are missing or of another step are written first.

    Args:
      config: Configuration of the run.
      step: Step of its model.
      with_train: Whether the artifacts must hold vectors of the training queries.
      cache: Local directory for data that are copied from an object store.

    Raises:
      InputError: If artifacts must be written, and the prepared data are missing or others.
    """
    path, dataset = _find(config, step, with_train, cache)
    # Opened first if they exist: the model takes memory for as many labels as they have.
    opened = ServingArtifacts.open(path) if dataset is None else None
    num_labels = opened.about.num_labels if dataset is None else dataset.num_labels
    tower, layout = workdir_lib.read_tower(config.workdir)
    if opened is not None and opened.vectors.shape[1] != tower.width:
        raise InputError(
            f"{path}: vectors of width {opened.vectors.shape[1]}, but the tower of the run has "
            f"width {tower.width}; remove the directory {path}; it is then written again"
        )
    model = workdir_lib.build_model(
        config, tower, layout, num_labels, workdir_lib.make_mesh(config)
    )
    params, labels, _ = workdir_lib.restore_model(config.workdir, model)
    if dataset is not None:
        _write(path, config, model, params, labels, dataset, step, with_train)
    return model, params, labels, opened or ServingArtifacts.open(path)


def _find(
    config: Config, step: int, with_train: bool, cache: str
) -> tuple[str, PreparedDataset | None]:
    """Returns where the artifacts of a run are, and the data to write them from if they must be.

    Args:
      config, step, with_train, cache: See `open_run`.

    Returns:
      The directory; the prepared data, or None if the directory holds artifacts of this step.
    """
    path = artifacts.locate(config.workdir)
    if os.path.isdir(path):
        about = artifacts.read_about(path)
        if about.step != step:
            console.status(
                f"{path}: of step {about.step}; written again for the model of step {step}"
            )
        elif about.has_train_vectors or not with_train:
            return path, None
    dataset = _open_data(config, path, cache)
    return os.path.join(config.workdir, artifacts.DIRECTORY), dataset


def _open_data(config: Config, path: str, cache: str) -> PreparedDataset:
    """Opens the prepared data of a run, to write its artifacts."""
    try:
        return workdir_lib.open_run_dataset(config, cache)
    except InputError as error:
        raise InputError(
            f"{path}: missing for this model, and cannot be written without the prepared data: "
            f"{error}"
        ) from None


def _write(
    path: str,
    config: Config,
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    step: int,
    with_train: bool,
) -> None:
    """Writes the artifacts of a model.

    Vectors come from the vector store of the run. What is not there is encoded and stored.

    Args:
      path: Directory to write.
      config, step, with_train: See `open_run`.
      model, params, labels: The model.
      dataset: Prepared data of the run.
    """
    console.status(f"{path}: vectors of {dataset.path}, model of step {step}")
    store = VectorStore(
        config.workdir, workdir_lib.vectors_step(config.workdir), dataset.content_hash
    )
    scored = ScoredSearch(
        model, params, labels, dataset, config.eval.block, store, True, distributed.ALONE
    )
    train = scored.queries("train") if with_train else None
    artifacts.save(path, dataset, step, scored.labels().values, train)
