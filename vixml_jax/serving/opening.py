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
from vixml_jax.saved_model import SavedModel
from vixml_jax.serving import artifacts
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import LabelState

_WRITES = 5  # How often artifacts are written that another process replaces before they are read.


def open_run(
    config: Config, saved: SavedModel, with_train: bool, cache: str
) -> tuple[Model, Any, LabelState, ServingArtifacts]:
    """Returns the model, its parameters and label state, and the serving artifacts of a run.

    Artifacts that are missing or of another step are written first.

    Args:
      config: Configuration of the run.
      saved: Its model.
      with_train: Whether the artifacts must hold vectors of the training queries.
      cache: Local directory for data that are copied from an object store.

    Raises:
      InputError: If artifacts must be written, and the prepared data are missing or others; or if
        other processes replace them again and again.
    """
    # Opened first if they exist: the model takes memory for as many labels as they have.
    path = artifacts.locate(config.workdir)
    opened = _open(path, saved.step, with_train)
    dataset = None if opened else _open_data(config, path, cache)
    num_labels = opened.about.num_labels if opened else dataset.num_labels
    tower, layout = workdir_lib.read_tower(config.workdir)
    if opened is not None and opened.vectors.shape[1] != tower.width:
        raise InputError(
            f"{path}: vectors of width {opened.vectors.shape[1]}, but the tower of the run has "
            f"width {tower.width}; remove the directory {path}; it is then written again"
        )
    model = workdir_lib.build_model(
        config, tower, layout, num_labels, workdir_lib.make_mesh(config)
    )
    params, labels = saved.restore(model)
    path = os.path.join(config.workdir, artifacts.DIRECTORY)
    for _ in range(_WRITES):
        if opened:
            return model, params, labels, opened
        _write(path, config, model, params, labels, dataset, saved, with_train)
        opened = _open(path, saved.step, with_train)
    raise InputError(
        f"{path}: other processes write it for models of other steps, while this one needs step "
        f"{saved.step}; run the same command again once the run is trained"
    )


def _open(path: str, step: int, with_train: bool) -> ServingArtifacts | None:
    """Opens artifacts; None if there are none of this step, or without the training queries."""
    if not os.path.isdir(path):
        return None
    about = artifacts.read_about(path)
    if about.step == step and (about.has_train_vectors or not with_train):
        opened = ServingArtifacts.open(path)
        about = opened.about  # They may just have been replaced.
        if about.step == step and (about.has_train_vectors or not with_train):
            return opened
    if about.step != step:
        console.status(f"{path}: of step {about.step}; written again for the model of step {step}")
    return None


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
    saved: SavedModel,
    with_train: bool,
) -> None:
    """Writes the artifacts of a model.

    Vectors come from the vector store of the run. What is not there is encoded and stored.

    Args:
      path: Directory to write.
      config, saved, with_train: See `open_run`.
      model, params, labels: The model.
      dataset: Prepared data of the run.
    """
    console.status(f"{path}: vectors of {dataset.path}, model of step {saved.step}")
    store = VectorStore(config.workdir, saved.vectors_step, dataset.content_hash)
    scored = ScoredSearch(
        model, params, labels, dataset, config.eval.block, store, True, distributed.ALONE
    )
    train = scored.vectors_of("train") if with_train else None
    artifacts.save(path, dataset, saved.step, scored.labels().values, train)
