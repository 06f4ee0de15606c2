"""Checkpoints of a run: training state, query clusters and data position, saved together."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.storage import digests, held, object_store
from vixml_jax.structs import LabelState, TrainState

T = TypeVar("T")
_READERS_S = 60.0  # How long the writing of a checkpoint waits for readers of its predecessor.


class Checkpoints:
    """Orbax checkpoints of a run, written in the background, with checksums of all files.

    A checkpoint holds three items: `model` (parameters and label state, all that evaluation
    needs), `training` (optimizer state, bank, clusters) and `position` (where the data iterator
    is). The best model so far is kept in a directory of its own, as a `model` item alone. The
    newest checkpoint's position names its step, so the two directories agree whenever the process
    is killed.

    Opening the directory cleans it up: half-written checkpoints are deleted, and checkpoints whose
    checksums do not match are moved to `<directory>.damaged/`, with a warning for each.

    Args:
      directory: Where the checkpoints are.
      max_to_keep: Number of newest checkpoints to keep.
      every: Steps between checkpoints.
      minutes: Also save when this many minutes have passed on process 0's clock; 0: never.
      best: Directory of the best model; None: none is kept.

    Raises:
      InputError: If there are checkpoints and all of them are damaged; nothing is moved then.
    """

    def __init__(
        self,
        directory: str,
        *,
        max_to_keep: int,
        every: int,
        minutes: float = 0.0,
        best: str | None = None,
    ):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._directory = object_store.absolute(directory)
        self._max_to_keep, self._every, self._minutes = max_to_keep, every, minutes
        _finish_replacement(self._directory)
        _finish_deletion([self._directory, *([object_store.absolute(best)] if best else [])])
        _move_damaged(self._directory)
        is_local = object_store.is_local(self._directory)
        # On a disk, old checkpoints are deleted by `_drop_old`, which spares those being read.
        self._manager = self._open(
            self._directory,
            ("model", "training", "position"),
            None if is_local else max_to_keep,
        )
        self._best_directory = best and object_store.absolute(best)
        self._best = best and self._open(self._best_directory, ("model",), None)
        self._due, self._saved_at = False, time.monotonic()
        self._pending: tuple[int, int] | None = None  # Step and bytes of an unfinished write.
        self._failed = False

    def _open(self, directory: str, items: tuple[str, ...], max_to_keep: int | None) -> Any:
        ocp = self._ocp
        return ocp.CheckpointManager(
            directory,
            item_names=items,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=digests.async_options(directory),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def position(self, kind: type[T]) -> T | None:
        """The data position of the newest checkpoint; None if there is no checkpoint.

        Args:
          kind: Its type.

        Raises:
          InputError: If the position is of another shape.
        """
        step = self.latest_step()
        if step is None:
            return None
        return digests.read_position(os.path.join(self._directory, str(step)), kind)

    def check_disk_space(self, like: TrainState) -> str:
        """A status line with the size of the checkpoints of such a state.

        Raises:
          InputError: If the disk cannot hold the checkpoints that a run keeps and the one being
            written.
        """
        checkpoint_bytes = nbytes(like._replace(frozen=()))
        model_bytes = nbytes((like.params, like.labels))
        count = self._max_to_keep + 1
        needed = count * checkpoint_bytes + (2 * model_bytes if self._best else 0)
        line = f"checkpoints: up to {_format_size(checkpoint_bytes)} each, at most {count} on disk"
        if self._best:
            line += f"; best model: up to {_format_size(model_bytes)}, at most 2 on disk"
        if not object_store.is_local(self._directory) or jax.process_index():
            return line
        free = shutil.disk_usage(self._directory).free
        used = _bytes_in(self._directory) + (_bytes_in(self._best_directory) if self._best else 0)
        if free + used < needed:
            raise InputError(
                f"{self._directory}: not enough disk space: {needed:,} bytes needed, {used:,} used "
                f"by this run so far and {free:,} free ({line}); free disk space, choose another "
                "--workdir, or lower --loop.max_to_keep"
            )
        return f"{line}; {_format_size(free)} free"

    def due(self, step: int) -> bool:
        """Whether to save after this step: a checkpoint is due and the last one is written.

        A checkpoint that falls due while another is being written stays due, so that training
        never waits for the disk.
        """
        elapsed_s = time.monotonic() - self._saved_at
        if step % self._every == 0 or 0 < 60 * self._minutes <= elapsed_s:
            self._due = True
        self.check()
        return self._due and self._pending is None

    def save(
        self, state: TrainState, clusters: Int[np.ndarray, " n"], position: dict[str, Any]
    ) -> None:
        """Saves a checkpoint under the state's step; returns once the arrays are copied.

        Waits for an unfinished write first. A checkpoint of the same step is replaced.

        Args:
          state: Its frozen parameters are not saved.
          clusters: Cluster of each training query.
          position: Data position, as JSON.

        Raises:
          InputError: If the disk is full, now or when the write is waited for. Earlier
            checkpoints are kept.
        """
        self.wait()
        step = int(state.step)
        replaces = step == self.latest_step()
        if replaces:
            _set_aside(self._directory, step)
            self._manager.reload()
        args = self._ocp.args
        self._pending = step, nbytes(state._replace(frozen=()))
        with self._reporting_disk_faults():
            saved = self._manager.save(
                step,
                args=args.Composite(
                    model=args.StandardSave({"params": state.params, "labels": state.labels}),
                    training=args.StandardSave(
                        {
                            "step": state.step,
                            "opt_state": state.opt_state,
                            "bank": state.bank,
                            "clusters": clusters,
                        }
                    ),
                    position=args.JsonSave(position),
                ),
            )
        assert saved, f"step {step} after step {self.latest_step()}"
        self._due, self._saved_at = False, time.monotonic()
        if replaces:
            self.wait()
            _finish_replacement(self._directory)

    def restore(
        self, like: TrainState, clusters: Int[np.ndarray, " n"]
    ) -> tuple[TrainState, Int[np.ndarray, " n"], dict[str, Any]]:
        """The newest checkpoint, sharded as `like` is, whatever mesh it was saved on.

        Padding rows are cut off or added as the mesh requires. If the best model that the position
        names is damaged or missing, a warning is printed and the position returned names none.

        Args:
          like: A state of the same shapes, dtypes and shardings, which may be abstract but for its
            frozen parameters, which are kept.
          clusters: An array of the clusters' shape and dtype.

        Returns:
          The state, the cluster of each training query, and the data position.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            like._replace(frozen={}),
        )
        items = digests.read(
            os.path.join(self._directory, str(self._manager.latest_step())),
            model={"params": abstract.params, "labels": abstract.labels},
            training={
                "step": abstract.step,
                "opt_state": abstract.opt_state,
                "bank": abstract.bank,
                "clusters": clusters,
            },
            position=None,
        )
        model, training = items["model"], items["training"]
        state = TrainState(
            step=training["step"],
            params=model["params"],
            frozen=like.frozen,
            opt_state=training["opt_state"],
            labels=LabelState(*model["labels"]),
            bank=training["bank"],
        )
        position = self._without_damaged_best(items["position"])
        return state, np.asarray(training["clusters"]), position

    def _without_damaged_best(self, position: dict[str, Any]) -> dict[str, Any]:
        """The position; it names no best model if that one cannot be read."""
        step = position["best_step"]
        if step is None or not self._best or position.get("head_from") is not None:
            return position
        reason = None
        if jax.process_index() == 0:
            reason = digests.damage(os.path.join(self._best_directory, str(step)))
        if distributed.broadcast_from_first(reason is None):
            return position
        if jax.process_index() == 0:
            moved = ""
            if step in self._best.all_steps():
                moved = f" and was moved to {_move(self._best_directory, step)}"
            print(
                f"{self._best_directory}: the best model (step {step}) is damaged ({reason})"
                f"{moved}; a new one is selected from the next evaluation on"
            )
        distributed.barrier("checkpoints: best moved")
        self._best.reload()
        return position | {"best": None, "best_step": None, "waited": 0}

    def save_best(self, state: TrainState, labels: LabelState) -> None:
        """Saves a best model beside the previous one; returns once it is on disk.

        Args:
          state: Its step and parameters are saved.
          labels: The label state that the parameters were evaluated with.
        """
        args = self._ocp.args
        self.wait()
        step = int(state.step)
        self._delete_best([other for other in self._best.all_steps() if other == step], force=True)
        self._pending = step, nbytes((state.params, labels))
        with self._reporting_disk_faults():
            model = args.StandardSave({"params": state.params, "labels": labels})
            self._best.save(step, args=args.Composite(model=model))
            self._best.wait_until_finished()
        self._pending = None

    def drop_best_but(self, step: int | None) -> None:
        """Deletes every best model but that of `step`, which the newest checkpoint names.

        The others are earlier best models, and those of a run that was killed before its next
        checkpoint.
        """
        if self._best:
            self.wait()
            self._delete_best([other for other in self._best.all_steps() if other != step])

    def _delete_best(self, steps: list[int], *, force: bool = False) -> None:
        """Deletes best models; without `force`, one that is being read goes at a later time."""
        wait_s = _READERS_S if force else 0.0
        for step in steps:
            if not object_store.is_local(self._best_directory):
                self._best.delete(step)
            elif jax.process_index() == 0:
                path = os.path.join(self._best_directory, str(step))
                held.delete(path, wait_s=wait_s, force=force)
        if steps and object_store.is_local(self._best_directory):
            distributed.barrier("checkpoints: best dropped")
            self._best.reload()

    def check(self) -> None:
        """Raises the error of a finished write, if it failed; does not wait for one under way."""
        if self._pending and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._reporting_disk_faults():
            self._manager.wait_until_finished()
        self._pending = None
        self._drop_old()

    def _drop_old(self) -> None:
        """Deletes all but the newest checkpoints; one that is being read, at a later time."""
        if jax.process_index() == 0 and object_store.is_local(self._directory):
            for step in digests.steps(self._directory)[: -self._max_to_keep]:
                held.delete(os.path.join(self._directory, str(step)))

    def close(self) -> None:
        """Waits for writes and closes the checkpoint managers."""
        if self._failed:  # The error has already been raised.
            return
        self.wait()
        self._manager.close()
        if self._best:
            self._best.close()

    @contextlib.contextmanager
    def _reporting_disk_faults(self) -> Iterator[None]:
        """Turns a disk fault into an `InputError` and deletes what is half written."""
        try:
            yield
        except Exception as error:
            self._failed = True
            fault = errors.disk_fault(error)
            if fault is None:
                raise
            directories = [d for d in (self._directory, self._best_directory) if d]
            # Measured before the half-written files are deleted.
            free = [shutil.disk_usage(d).free for d in directories if object_store.is_local(d)]
            if jax.process_index() == 0:
                for path in (p for d in directories for p in epath.Path(d).iterdir()):
                    if not path.name.isdigit():
                        path.rmtree(missing_ok=True)
            step, size = self._pending or (0, 0)
            steps = digests.steps(self._directory)
            latest = f"the checkpoint of step {steps[-1]} is kept" if steps else "none was saved"
            was_free = f", {free[0]:,} bytes were free" if free else ""
            raise InputError(
                f"{self._directory}: {fault} while saving step {step} (up to {size:,} bytes"
                f"{was_free}); {latest}; free disk space and run the same command again"
            ) from None


def _finish_deletion(directories: list[str]) -> None:
    """Deletes the rest of checkpoints whose deletion was interrupted."""
    for directory in directories:
        if jax.process_index() == 0 and epath.Path(directory).is_dir():
            for path in epath.Path(directory).iterdir():
                if path.name.endswith(held.DELETED):
                    path.rmtree(missing_ok=True)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays over all devices, before compression."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _format_size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _bytes_in(directory: str) -> int:
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(directory)
        for name in names
    )


def _move_damaged(directory: str) -> None:
    """Moves the damaged checkpoints that are newer than the newest intact one out of the way."""
    step, damaged = None, {}
    if jax.process_index() == 0:
        step, damaged = digests.newest_intact(directory)
    step = distributed.broadcast_from_first(-1 if step is None else step)
    if step < 0 and distributed.broadcast_from_first(bool(damaged)):
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items())
        raise InputError(
            f"{directory}: all checkpoints are damaged ({reasons}); nothing was changed; restore "
            "one from a backup, or start again with another --workdir"
        )
    for number, reason in damaged.items():
        target = _move(directory, number)
        print(
            f"{directory}: the checkpoint of step {number} is damaged ({reason}) and was moved to "
            f"{target}; resuming from step {step}"
        )
    distributed.barrier("checkpoints: damaged moved")


def _move(directory: str, step: int) -> str:
    """Moves a checkpoint to `<directory>.damaged/`, under a new name if its step is taken there.

    Returns:
      The new path.
    """
    parent = epath.Path(f"{directory}.damaged")
    parent.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in parent.iterdir()}
    names = [str(step), *(f"{step}.{n}" for n in range(2, len(taken) + 3))]
    target = parent / next(name for name in names if name not in taken)
    (epath.Path(directory) / str(step)).rename(target)
    return os.fspath(target)


def _set_aside(directory: str, step: int) -> None:
    """Moves a checkpoint to `<directory>.replaced/`, where others read it until it is replaced."""
    if jax.process_index() == 0:
        parent = epath.Path(directory + digests.REPLACED)
        parent.mkdir(parents=True, exist_ok=True)
        path, target = epath.Path(directory) / str(step), parent / str(step)
        if object_store.is_local(directory):
            held.move(os.fspath(path), os.fspath(target), wait_s=_READERS_S)
        else:
            path.rename(target)
    distributed.barrier("checkpoints: set aside")


def _finish_replacement(directory: str) -> None:
    """Deletes what `_set_aside` moved if its replacement is complete, and else moves it back."""
    parent = epath.Path(directory + digests.REPLACED)
    if jax.process_index() == 0 and parent.is_dir():
        for path in parent.iterdir():
            if not path.name.isdigit():  # Its deletion was interrupted.
                path.rmtree()
            elif not (epath.Path(directory) / path.name).is_dir():
                path.rename(epath.Path(directory) / path.name)
            elif object_store.is_local(directory):
                held.delete(os.fspath(path), wait_s=_READERS_S, force=True)
            else:
                path.rmtree()
        parent.rmdir()
    distributed.barrier("checkpoints: put back")
