"""Checkpoints: the state, the clusters and the position in the data, saved and found together."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.storage import digests, object_store
from vixml_jax.structs import LabelState, TrainState


class Checkpoints:
    """Orbax checkpoints of a run, written in the background, sealed with digests, checked when
    found.

    A checkpoint holds three items: `model` (parameters and label state, all that evaluation
    needs), `training` (optimizer, bank, clusters) and `position` (where the data stand). The best
    model so far lies in a directory of its own, as a `model` alone; which one that is the newest
    checkpoint's position says, so a kill at any time leaves the two in agreement.

    Opening the directory makes order in it: what a kill left half written goes, and checkpoints
    that are not as they were written move to `<directory>.damaged/`, said in a line each.

    Args:
      directory: Of the checkpoints.
      keep: Newest ones kept.
      every: Steps after which one is due,
      minutes: and minutes, of process 0's clock; 0: never.
      best: Directory of the best model; None: none is kept.

    Raises:
      InputError: If there are checkpoints, and all of them are damaged; then nothing is moved.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int,
        every: int,
        minutes: float = 0.0,
        best: str | None = None,
    ):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._directory = object_store.absolute(directory)
        self._keep, self._every, self._minutes = keep, every, minutes
        _put_back(self._directory)
        _move_damaged(self._directory)
        self._manager = self._open(self._directory, ("model", "training", "position"), keep)
        self._best_directory = best and object_store.absolute(best)
        self._best = best and self._open(self._best_directory, ("model",), None)
        self._due, self._saved_at = False, time.monotonic()
        self._under_way: tuple[int, int] | None = None  # Step and bytes.
        self._failed = False

    def _open(self, directory: str, items: tuple[str, ...], keep: int | None) -> Any:
        ocp = self._ocp
        return ocp.CheckpointManager(
            directory,
            item_names=items,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=digests.writer(directory),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def check_room(self, like: TrainState) -> str:
        """What checkpoints of such a state take, in a line.

        Raises:
          InputError: If the disk has no room for those that a run keeps and the one under way.
        """
        size = nbytes(like._replace(frozen=()))
        model = nbytes((like.params, like.labels))
        count = self._keep + 1
        wanted = count * size + (2 * model if self._best else 0)
        told = f"checkpoints: up to {_amount(size)} each, {count} at a time"
        if self._best:
            told += f", and the best model, up to {_amount(model)}, twice"
        if not object_store.is_local(self._directory) or jax.process_index():
            return told
        free = shutil.disk_usage(self._directory).free
        held = _bytes_in(self._directory) + (_bytes_in(self._best_directory) if self._best else 0)
        if free + held < wanted:
            raise InputError(
                f"{self._directory}: no room for {told}: {wanted:,} bytes, and {free:,} are free "
                f"beside the {held:,} that this run has there; make room, choose another "
                "--workdir, or keep fewer (--loop.keep)"
            )
        return f"{told}; {_amount(free)} free"

    def due(self, step: int) -> bool:
        """Whether to save after this step: one is due, and the one before is written.

        One that falls due while another is written is due from then on: the loop never waits.
        """
        waited = time.monotonic() - self._saved_at
        if step % self._every == 0 or 0 < 60 * self._minutes <= waited:
            self._due = True
        self.check()
        return self._due and self._under_way is None

    def save(
        self, state: TrainState, clusters: Int[np.ndarray, " n"], position: dict[str, Any]
    ) -> None:
        """Saves under the state's step; returns once the arrays are copied.

        Waits for the one before, should it still be written. One of the same step is replaced.

        Raises:
          InputError: If the disk is full, here or where it is found later. What was saved before
            stands.
        """
        self.wait()
        step = int(state.step)
        replaced = step == self.latest_step()
        if replaced:
            _set_aside(self._directory, step)
            self._manager.reload()
        args = self._ocp.args
        self._under_way = step, nbytes(state._replace(frozen=()))
        with self._on_disk():
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
        if replaced:
            self.wait()
            _put_back(self._directory)

    def restore(
        self, like: TrainState, clusters: Int[np.ndarray, " n"]
    ) -> tuple[TrainState, Int[np.ndarray, " n"], dict[str, Any]]:
        """The newest checkpoint, placed as `like` is, whatever mesh it was saved on: rows that
        stand for nothing are left out or filled with zeros.

        Where the best model that it names is damaged or gone, which is said, none is named.

        Args:
          like: A state of the same shapes and shardings; of its arrays the frozen ones are kept.
          clusters: An array of the clusters' shape and dtype.
        """
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        found = digests.read(
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
        model, training = found["model"], found["training"]
        state = TrainState(
            step=training["step"],
            params=model["params"],
            frozen=like.frozen,
            opt_state=training["opt_state"],
            labels=LabelState(*model["labels"]),
            bank=training["bank"],
        )
        position = self._with_best(found["position"])
        return state, np.asarray(training["clusters"]), position

    def _with_best(self, position: dict[str, Any]) -> dict[str, Any]:
        """The position, without a best model that cannot be read."""
        step = position["best_step"]
        if step is None or not self._best:
            return position
        said = None
        if jax.process_index() == 0:
            said = digests.damage(os.path.join(self._best_directory, str(step)))
        if distributed.first_says(said is None):
            return position
        if jax.process_index() == 0:
            where = _move(self._best_directory, step) if step in self._best.all_steps() else None
            print(
                f"{self._best_directory}: step {step}, the best model, is damaged ({said})"
                f"{where and f': moved to {where}'}; the best is chosen among what is judged from "
                "here on"
            )
        distributed.meet("checkpoints: best moved")
        self._best.reload()
        return position | {"best": None, "best_step": None, "waited": 0}

    def save_best(self, state: TrainState, labels: LabelState) -> None:
        """Saves a state's parameters, with the labels that they were judged with, beside the best
        model before; returns once they are on disk."""
        args = self._ocp.args
        self.wait()
        self._under_way = int(state.step), nbytes((state.params, labels))
        with self._on_disk():
            model = args.StandardSave({"params": state.params, "labels": labels})
            self._best.save(int(state.step), args=args.Composite(model=model))
            self._best.wait_until_finished()
        self._under_way = None

    def drop_best_but(self, step: int | None) -> None:
        """Deletes all that `save_best` saved but the model of `step`, which the newest checkpoint
        names: older ones, and those of a run that was killed before its next checkpoint."""
        if self._best:
            self.wait()
            for other in self._best.all_steps():
                if other != step:
                    self._best.delete(other)

    def check(self) -> None:
        """Raises what went wrong in a write that is over; does not wait for one that is not."""
        if self._under_way and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._on_disk():
            self._manager.wait_until_finished()
        self._under_way = None

    def close(self) -> None:
        """Waits and lets go."""
        if self._failed:  # What there is to say has been said.
            return
        self.wait()
        self._manager.close()
        if self._best:
            self._best.close()

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Turns a disk that takes no more into one line, and removes what was half written."""
        try:
            yield
        except Exception as error:
            self._failed = True
            said = errors.disk_fault(error)
            if said is None:
                raise
            directories = [d for d in (self._directory, self._best_directory) if d]
            free = [shutil.disk_usage(d).free for d in directories if object_store.is_local(d)]
            if jax.process_index() == 0:
                for path in (p for d in directories for p in epath.Path(d).iterdir()):
                    if not path.name.isdigit():
                        path.rmtree(missing_ok=True)
            step, size = self._under_way or (0, 0)
            standing = digests.steps(self._directory)
            stands = (
                f"the checkpoint of step {standing[-1]} stands" if standing else "none is saved"
            )
            raise InputError(
                f"{self._directory}: {said} while saving step {step}, which takes up to {size:,} "
                f"bytes; {', '.join(f'{n:,}' for n in free[:1])} were free; {stands}: make room "
                "and start again with the same command"
            ) from None


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, over all devices, as they are written but for compression."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _bytes_in(directory: str) -> int:
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(directory)
        for name in names
    )


def _move_damaged(directory: str) -> None:
    """Moves checkpoints that are newer than the newest whole one, so damaged, out of the way."""
    step, damaged = digests.newest_whole(directory)
    if step is None and distributed.first_says(bool(damaged)):
        listed = "; ".join(f"step {found}: {said}" for found, said in damaged.items())
        raise InputError(
            f"{directory}: no checkpoint is whole ({listed}); nothing was changed; put one back, "
            "or start anew in another --workdir"
        )
    for found, said in damaged.items():
        where = _move(directory, found)
        print(
            f"{directory}: the checkpoint of step {found} is damaged ({said}): moved to {where}; "
            f"going on from step {step}"
        )
    distributed.meet("checkpoints: damaged moved")


def _move(directory: str, step: int) -> str:
    """Moves a checkpoint to `<directory>.damaged/`, beside others of its step; returns where."""
    aside = epath.Path(f"{directory}.damaged")
    aside.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in aside.iterdir()}
    names = [str(step), *(f"{step}.{n}" for n in range(2, len(taken) + 3))]
    to = aside / next(name for name in names if name not in taken)
    (epath.Path(directory) / str(step)).rename(to)
    return os.fspath(to)


def _set_aside(directory: str, step: int) -> None:
    """Makes way for another checkpoint of the same step: until that stands, `_put_back` returns
    this one."""
    if jax.process_index() == 0:
        aside = epath.Path(f"{directory}.replaced")
        aside.mkdir(parents=True, exist_ok=True)
        (epath.Path(directory) / str(step)).rename(aside / str(step))
    distributed.meet("checkpoints: set aside")


def _put_back(directory: str) -> None:
    """Returns what `_set_aside` moved, or deletes it if the other one stands."""
    aside = epath.Path(f"{directory}.replaced")
    if jax.process_index() == 0 and aside.is_dir():
        for path in aside.iterdir():
            if (epath.Path(directory) / path.name).is_dir():
                path.rmtree()
            else:
                path.rename(epath.Path(directory) / path.name)
        aside.rmdir()
    distributed.meet("checkpoints: put back")
