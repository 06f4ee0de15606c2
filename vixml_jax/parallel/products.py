"""Operations of the matrix products of a traced program, before the compiler changes it.

Unlike `training.flops`, which counts useful work, this counts what the program asks for: padding of
batches, and activations that are computed again in the backward pass.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

# Kinds of products: of bfloat16 (or float16), and of float32 at JAX's precisions.
KINDS = ("bfloat16", "float32", "float32, high", "float32, highest")
# Products of one attention forward, and of its backward pass, which repeats one.
_CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def of_program(traced: jax.stages.Traced, num_devices: int) -> dict[str, float]:
    """Operations of each device, by kind of product, for programs that share all work evenly.

    A multiplication and an addition count as two.

    Raises:
      ValueError: If a loop of unknown length holds a product.
    """
    found = dict.fromkeys(KINDS, 0.0)
    _count(traced.jaxpr.jaxpr, 1.0 / num_devices, found)
    return found


def _count(jaxpr: Any, times: float, found: dict[str, float]) -> None:
    """Adds the operations of a jaxpr that is executed `times` times to `found`."""
    for eqn in jaxpr.eqns:
        count = _PRODUCTS.get(eqn.primitive.name)
        if count:
            found[_kind(eqn)] += times * count(eqn)
        elif eqn.primitive.name in _CUDNN:
            found["bfloat16"] += times * _CUDNN[eqn.primitive.name] * _attention(eqn)
        elif eqn.primitive.name == "cond":
            branches = [dict.fromkeys(KINDS, 0.0) for _ in eqn.params["branches"]]
            for branch, part in zip(eqn.params["branches"], branches, strict=True):
                _count(branch.jaxpr, times, part)
            largest = max(branches, key=lambda part: sum(part.values()))
            for kind, value in largest.items():
                found[kind] += value
        else:
            inner = dict.fromkeys(KINDS, 0.0)
            for one in core.jaxprs_in_params(eqn.params):
                _count(one, times * _repeats(eqn), inner)
            if eqn.primitive.name == "while" and any(inner.values()):
                raise ValueError(f"a loop of unknown length with products: {str(eqn)[:200]}")
            for kind, value in inner.items():
                found[kind] += value


def _repeats(eqn: Any) -> float:
    """How often an equation executes the jaxprs in it."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":  # Executed on each device of these axes.
        axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))  # By version.
        return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    return 1.0


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _convolution(eqn: Any) -> float:
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    each = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * each


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
}


def _attention(eqn: Any) -> float:
    """Operations of one product of an attention: queries [b t h a], keys [b s h a]."""
    batch, queries, heads, width = eqn.invars[0].aval.shape
    return 2.0 * batch * heads * queries * eqn.invars[1].aval.shape[1] * width


def _kind(eqn: Any) -> str:
    if np.dtype(eqn.invars[0].aval.dtype).itemsize <= 2:
        return "bfloat16"
    precision = eqn.params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    name = "default" if precision is None else precision.name.lower()
    return {
        "bf16_bf16_f32": "bfloat16",  # One pass of float32 operands.
        "default": "float32",
        "high": "float32, high",
        "highest": "float32, highest",
    }[name]
