"""AdamW with the paper's parameter groups, schedule and clipping (supplement, training)."""

from typing import Any

import jax
import optax


def schedule(peak: float, *, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """A learning rate that rises linearly to `peak` over the warm-up, then falls linearly to 0."""
    warmup_steps = min(warmup_steps, max(total_steps - 1, 0))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
            optax.linear_schedule(peak, 0.0, max(total_steps - warmup_steps, 1)),
        ],
        [warmup_steps],
    )


def schedules(
    *,
    learning_rate: float,
    label_learning_rate: float,
    image_learning_rate: float,
    warmup_steps: int,
    total_steps: int,
) -> dict[str, optax.Schedule]:
    """Returns the learning-rate schedule of each parameter group, by the name of the group."""
    peaks = {
        "tower": learning_rate,
        "labels": label_learning_rate,
        "images": image_learning_rate,
    }
    return {
        group: schedule(peak, warmup_steps=warmup_steps, total_steps=total_steps)
        for group, peak in peaks.items()
    }


def make_optimizer(
    *,
    learning_rate: float,
    label_learning_rate: float,
    image_learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    clip_norm: float,
    total_steps: int,
) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, eps 1e-6) with one schedule and a peak rate for each parameter group.

    Groups: the tower; the combiner and the free vectors; the image projection. Weight decay is
    decoupled; biases, norms and free vectors do not decay.

    Args:
      learning_rate: Peak rate of the tower.
      label_learning_rate: Peak rate of the combiner and the free vectors.
      image_learning_rate: Peak rate of the image projection.
      weight_decay: Times the learning rate, what a weight loses in a step.
      warmup_steps: Steps until the peak.
      clip_norm: Largest global norm of the gradient; 0: no clipping.
      total_steps: Steps until the rate is 0 again.
    """
    rates = {
        group: optax.scale_by_learning_rate(rate)
        for group, rate in schedules(
            learning_rate=learning_rate,
            label_learning_rate=label_learning_rate,
            image_learning_rate=image_learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        ).items()
    }
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.partition(rates, groups),
    )


def groups(params: Any) -> Any:
    """A tree of group names: "tower", "labels" or "images" for each parameter."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        names = _names(path)
        if names[0] != "tower":
            return "labels"
        return "images" if "image_projection" in names else "tower"

    return jax.tree_util.tree_map_with_path(group, params)


def decayed(params: Any) -> Any:
    """A tree of booleans: True for weights; False for biases, norms and free vectors."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = _names(path)
        return names[0] != "free" and names[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
