"""The model of a run as other commands read it: the best so far, or else the newest."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import msgspec
from etils import epath

from vixml_jax import config as config_lib
from vixml_jax import frozen_weights
from vixml_jax.config import Config
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import tree_utils
from vixml_jax.storage import digests, held, object_store
from vixml_jax.structs import LabelState
from vixml_jax.workdir import BEST, CHECKPOINTS, CONFIG, NOT_A_RUN


class _Position(msgspec.Struct):
    """What is read of the position in a checkpoint; see `training.epoch_loop.Position`."""

    best_step: int | None
    head_from: int | None = None


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model that training has saved. Within the context of `opened`, its files stay.

    Attributes:
      workdir: The run directory.
      path: Directory of the checkpoint.
      step: Its step.
      head_from: Step at which the epochs of its head began; None: before them.
    """

    workdir: str
    path: str
    step: int
    head_from: int | None

    @property
    def vectors_step(self) -> int:
        """Step whose vectors of queries and labels are those of this model.

        It is its own step, or in head epochs, which change no vectors, the one before them.
        """
        return self.step if self.head_from is None else self.head_from

    @property
    def digest(self) -> str:
        """What tells it from other models, such as those of other runs at the same step."""
        return digests.of_all(self.path)

    @property
    def is_best(self) -> bool:
        """Whether it was selected by `--loop.monitor`, rather than as the newest."""
        return os.path.basename(os.path.dirname(self.path)) == BEST

    def restore(self, model: Model) -> tuple[Any, LabelState]:
        """Returns the parameters and the label state, on the mesh of `model`.

        The parameters of a run with a label head have no "head" if nothing has trained it yet.

        Raises:
          InputError: If the frozen weights are damaged.
        """
        config = config_lib.load(os.path.join(self.workdir, CONFIG))
        params = model.abstract_params
        if model.head is not None and self._has_head(config):
            params = {**params, "head": model.abstract_head}
        head_only = config.head.only
        trained, frozen = frozen_weights.split(params, model.tower.config, head_only=head_only)
        abstract = {
            "params": sharding.stored_tree(trained, model.mesh),
            "labels": sharding.stored_tree(model.table.abstract_state, model.mesh),
        }
        restored = digests.read(self.path, model=abstract)["model"]
        params = restored["params"]
        if frozen:
            like = frozen_weights.as_stored(frozen, frozen_weights.dtype(config))
            stored = frozen_weights.load(self.workdir, sharding.stored_tree(like, model.mesh))
            params = tree_utils.merge(params, stored)
        return params, LabelState(*restored["labels"])

    def _has_head(self, config: Config) -> bool:
        """Whether it holds a label head: it is trained in all steps, or has been refitted."""
        if config.head.only or config.head.weight:
            return True
        return self.head_from is not None


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[SavedModel]:
    """Yields the model to evaluate; a training that goes on does not delete it meanwhile.

    Damaged checkpoints are skipped with a warning and left in place. With several processes, all
    must call it together; process 0 verifies the checkpoints.

    Raises:
      InputError: If there is no intact checkpoint, or the best model is damaged or missing.
    """
    with contextlib.ExitStack() as stack:
        found = None
        if jax.process_index() == 0:
            try:
                found = _find(workdir, stack)
            except BaseException:
                distributed.broadcast_from_first(False)
                raise
        if not distributed.broadcast_from_first(found is not None):
            raise InputError(f"{workdir}: process 0 found no model")
        if jax.process_count() > 1:
            found = _as_on_first(workdir, found)
        yield found
        # Process 0 alone holds the files.
        distributed.barrier("saved model: read")


def restore(workdir: str, model: Model) -> tuple[Any, LabelState, int]:
    """Returns parameters, label state and step of the model to evaluate; see `SavedModel`."""
    with opened(workdir) as saved:
        return *saved.restore(model), saved.step


def _as_on_first(workdir: str, found: SavedModel | None) -> SavedModel:
    """Returns on all processes what process 0 found."""
    values = (0, 0, -1)
    if found:
        values = found.is_best, found.step, -1 if found.head_from is None else found.head_from
    is_best, step, head_from = (distributed.broadcast_from_first(value) for value in values)
    directory = os.path.join(workdir, BEST if is_best else CHECKPOINTS)
    path = object_store.absolute(os.path.join(directory, str(step)))
    return SavedModel(workdir, path, step, None if head_from < 0 else head_from)


def _find(workdir: str, stack: contextlib.ExitStack) -> SavedModel:
    """Finds the model, whose directory `stack` then holds."""
    directory = object_store.absolute(os.path.join(workdir, CHECKPOINTS))
    if not epath.Path(directory).is_dir():
        raise InputError(f"{directory}: not found; {NOT_A_RUN}")
    while True:  # Training may delete what was just found; then there is a newer one.
        before = _listing(directory)
        with contextlib.ExitStack() as attempt:
            try:
                found = _try_to_find(workdir, directory, attempt)
            except (InputError, OSError, ValueError):
                if _listing(directory) == before:
                    raise
                continue
            stack.push(attempt.pop_all())
            return found


def _listing(directory: str) -> list[Any]:
    """Returns what tells the checkpoints of a run from those of a later moment."""
    paths = _complete(directory)
    if not object_store.is_local(directory):
        return paths
    found = []
    for step, path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            found.append((step, status.st_ino, status.st_mtime_ns))
    return found


def _complete(directory: str) -> list[tuple[int, str]]:
    """Returns steps and directories of the checkpoints, newest first.

    A checkpoint whose replacement is being written is elsewhere, and as good.
    """
    parents = directory, directory + digests.REPLACED
    found = [(n, os.path.join(parent, str(n))) for parent in parents for n in digests.steps(parent)]
    return sorted(found, reverse=True)


def _try_to_find(workdir: str, directory: str, stack: contextlib.ExitStack) -> SavedModel:
    damaged = {}
    for step, path in _complete(directory):
        stack.enter_context(_there(path))
        if (damage := digests.damage(path)) is None:
            break
        damaged[step] = damage
    else:
        raise InputError(
            f"{directory}: {_damages(damaged) or 'no checkpoint has been written yet'}"
        )
    if damaged:
        print(f"warning: {directory}: {_damages(damaged)}; reading step {step} instead")
    position = digests.read_position(path, _Position)
    # The head is refitted from the best model.
    if position.best_step is None or position.head_from is not None:
        return SavedModel(workdir, path, step, position.head_from)
    best, best_step = object_store.absolute(os.path.join(workdir, BEST)), position.best_step
    path = os.path.join(best, str(best_step))
    if not epath.Path(path).is_dir():
        raise InputError(f"{best}: step {best_step}, the best model, is missing")
    stack.enter_context(_there(path))
    if damage := digests.damage(path):
        raise InputError(f"{best}: step {best_step}, the best model, is damaged ({damage})")
    return SavedModel(workdir, path, best_step, None)


def _damages(damaged: dict[int, str]) -> str:
    return "; ".join(f"the checkpoint of step {n} is damaged ({damaged[n]})" for n in damaged)


@contextlib.contextmanager
def _there(path: str) -> Iterator[None]:
    """Holds a directory.

    Raises:
      FileNotFoundError: If it has just been deleted.
    """
    if not object_store.is_local(path):
        yield
        return
    with held.reading(path) as is_there:
        if not is_there:
            raise FileNotFoundError(path)
        yield
