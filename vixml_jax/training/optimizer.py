"""AdamW with the paper's parameter groups, its schedule and clipping (supplement, training)."""

from typing import Any

import jax
import optax


def schedule(peak: float, *, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` over the warm-up, then linear to 0 at the last step."""
    warmup_steps = min(warmup_steps, max(total_steps - 1, 0))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
            optax.linear_schedule(peak, 0.0, max(total_steps - warmup_steps, 1)),
        ],
        [warmup_steps],
    )


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
    """AdamW (0.9, 0.999, eps 1e-6), decoupled decay, one schedule, a peak rate for each group.

    Groups: the tower; the combiner and the free vectors; the image projection. Biases, norms and
    free vectors do not decay.
    """
    peaks = {
        "tower": learning_rate,
        "labels": label_learning_rate,
        "images": image_learning_rate,
    }
    rates = {
        group: optax.scale_by_learning_rate(
            schedule(peak, warmup_steps=warmup_steps, total_steps=total_steps)
        )
        for group, peak in peaks.items()
    }
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.partition(rates, groups),
    )


def groups(params: Any) -> Any:
    """The group of each parameter, by its path."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        names = _names(path)
        if names[0] != "tower":
            return "labels"
        return "images" if "image_projection" in names else "tower"

    return jax.tree_util.tree_map_with_path(group, params)


def decayed(params: Any) -> Any:
    """Whether each parameter decays: weights do; biases, norms and free vectors do not."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = _names(path)
        return names[0] != "free" and names[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
