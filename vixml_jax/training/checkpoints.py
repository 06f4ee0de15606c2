"""Checkpoints: the state, the clusters and the position in the data, saved and found together."""

import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from vixml_jax.structs import LabelState, TrainState


class Checkpoints:
    """Orbax checkpoints of a run, written in the background.

    A checkpoint holds three items: `model` (parameters and label state, all that evaluation
    needs), `training` (optimizer, bank, clusters) and `position` (where the data stand). The best
    model so far lies in a directory of its own, as a `model` alone; which one that is the newest
    checkpoint's position says, so a kill at any time leaves the two in agreement.

    Args:
      directory: Of the checkpoints.
      keep: Newest ones kept.
      best: Directory of the best model; None: none is kept.
    """

    def __init__(self, directory: str, *, keep: int, best: str | None = None):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            os.path.abspath(directory),
            item_names=("model", "training", "position"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )
        self._best = best and ocp.CheckpointManager(os.path.abspath(best), item_names=("model",))

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, clusters: Int[np.ndarray, " n"], position: dict[str, Any]
    ) -> None:
        """Saves under the state's step; returns once the arrays are copied."""
        args = self._ocp.args
        self._manager.save(
            int(state.step),
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

    def restore(
        self, like: TrainState, clusters: Int[np.ndarray, " n"]
    ) -> tuple[TrainState, Int[np.ndarray, " n"], dict[str, Any]]:
        """The newest checkpoint, placed as `like` is.

        Args:
          like: A state of the same shapes and shardings; of its arrays the frozen ones are kept.
          clusters: An array of the clusters' shape and dtype.
        """
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        args = self._ocp.args
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=args.Composite(
                model=args.StandardRestore({"params": abstract.params, "labels": abstract.labels}),
                training=args.StandardRestore(
                    {
                        "step": abstract.step,
                        "opt_state": abstract.opt_state,
                        "bank": abstract.bank,
                        "clusters": clusters,
                    }
                ),
                position=args.JsonRestore(),
            ),
        )
        model, training = restored["model"], restored["training"]
        state = TrainState(
            step=training["step"],
            params=model["params"],
            frozen=like.frozen,
            opt_state=training["opt_state"],
            labels=LabelState(*model["labels"]),
            bank=training["bank"],
        )
        return state, np.asarray(training["clusters"]), restored["position"]

    def save_best(self, state: TrainState, labels: LabelState) -> None:
        """Saves a state's parameters, with the labels that they were judged with, beside the best
        model before; returns once they are on disk."""
        args = self._ocp.args
        model = args.StandardSave({"params": state.params, "labels": labels})
        self._best.save(int(state.step), args=args.Composite(model=model))
        self._best.wait_until_finished()

    def drop_best_but(self, step: int | None) -> None:
        """Deletes all that `save_best` saved but the model of `step`, which the newest checkpoint
        names: older ones, and those of a run that was killed before its next checkpoint."""
        if self._best:
            self.wait()
            for other in self._best.all_steps():
                if other != step:
                    self._best.delete(other)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.close()
        if self._best:
            self._best.close()
