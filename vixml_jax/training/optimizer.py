"""The optimizers: the paper's AdamW (supplement, training), and Adam for the label head."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt


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


def head_optimizer(
    rate: optax.Schedule, moments: Literal["float32", "bfloat16"]
) -> optax.GradientTransformation:
    """Adam (0.9, 0.999, eps 1e-8) without weight decay, for the label head.

    Gradients of rare labels are tiny; under the eps of the paper's AdamW, 1e-6, they would hardly
    move. With bfloat16 moments, a step changes the second moment by less than their resolution, so
    they are rounded up or down at random, which keeps their expectation. The random numbers follow
    from the step, so that a resumed run repeats them.

    Args:
      rate: Learning rate of each step.
      moments: Data type of the moments.
    """
    b1, b2, eps = 0.9, 0.999, 1e-8
    dtype = jnp.dtype(moments)

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        gradient: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu, nu = optax.tree.cast((state.mu, state.nu), jnp.float32)
        mu = jax.tree.map(lambda g, m: b1 * m + (1.0 - b1) * g, gradient, mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * g**2, gradient, nu)
        # One factor for both bias corrections and the rate costs less than three full-size ones.
        root = jnp.sqrt(1.0 - b2**count)
        step = -rate(state.count) * root / (1.0 - b1**count)
        updates = jax.tree.map(lambda m, v: step * m / (jnp.sqrt(v) + eps * root), mu, nu)
        if dtype == jnp.bfloat16:
            mu = _rounded(mu, _mixed(2 * count))
            nu = _rounded(nu, _mixed(2 * count + 1))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def with_head(
    model_optimizer: optax.GradientTransformation, head: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Updates `params["head"]` by one optimizer and the rest by another, as it is without head."""

    def part(path: tuple[Any, ...], _: Any) -> str:
        return "head" if _names(path)[0] == "head" else "model"

    return optax.partition(
        {"model": model_optimizer, "head": head},
        functools.partial(jax.tree_util.tree_map_with_path, part),
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


def _rounded(tree: Any, seed: UInt[Array, ""]) -> Any:
    """float32 arrays as bfloat16, each rounded up or down at random, so that its mean is kept."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        _stochastic_round(x, _mixed(seed + jnp.uint32(i))) for i, x in enumerate(leaves)
    )


def _stochastic_round(x: Float[Array, "..."], seed: UInt[Array, ""]) -> Float[Array, "..."]:
    """`x` as bfloat16, rounded away from 0 with the probability of what truncation would lose."""
    # Computed from the index of each entry, within the loop that rounds it: `jax.random` would
    # store several arrays of the size of `x`, more than bfloat16 saves.
    random = seed
    for axis in range(x.ndim):
        shape = [size if i == axis else 1 for i, size in enumerate(x.shape)]
        random = _mixed(random + jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + (random >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _mixed(x: UInt[Array, "..."] | Int[Array, "..."]) -> UInt[Array, "..."]:
    """A 32-bit hash: lowbias32 of Chris Wellons (https://nullprogram.com/blog/2018/07/31/)."""
    x = x.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
