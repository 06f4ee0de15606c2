"""Layers that towers share: contractions, norms, dropout, attention, table look-up, pooling."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax import axes

Initializer = Callable[..., Array]


def uniform(bound: float) -> Initializer:
    """Initialises uniformly in [-bound, bound]."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_in_uniform(fan_in: int) -> Initializer:
    """What `torch.nn.Linear` draws its weight and its bias from: U(±1/sqrt(fan_in))."""
    return uniform(1.0 / math.sqrt(fan_in))


def constrain(x: Float[Array, "..."], letters: str) -> Float[Array, "..."]:
    """Keeps an activation laid out as its letters say; nothing without a mesh and rules."""
    return nn.with_logical_constraint(x, axes.logical(letters))


class Einsum(nn.Module):
    """Contracts the input with a weight, as `equation` says, and adds a bias.

    The letters of the weight give its shape (through `sizes`) and its logical axes. The bias has
    the letters of the weight that the output keeps.

    Attributes:
      equation: E.g. "psd,dha->psha".
      sizes: Size of each letter of the weight.
      kernel_init: Draws the weight, float32.
      bias_init: Draws the bias, float32.
      dtype: What is computed in.
    """

    equation: str
    sizes: Mapping[str, int]
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        operands, output = self.equation.split("->")
        inputs, weight = operands.split(",")
        summed = "".join(letter for letter in weight if letter in inputs)
        kept = "".join(letter for letter in weight if letter not in inputs)
        batch = inputs.removesuffix(summed)
        if inputs != batch + summed or weight != summed + kept or output != batch + kept:
            raise ValueError(f"{self.equation}: expected the form 'xs,sk->xk'")
        kernel = self._param("kernel", weight, self.kernel_init)
        bias = self._param("bias", kept, self.bias_init)
        # As one product of matrices: XLA's CPU backend computes the gradient of the weight up to
        # three times slower where the input has more than one batch dimension.
        num_summed = math.prod(self.sizes[letter] for letter in summed)
        y = x.astype(self.dtype).reshape(-1, num_summed) @ kernel.reshape(num_summed, -1)
        y = y + bias.reshape(-1)
        return y.reshape(*x.shape[: len(batch)], *bias.shape)

    def _param(self, name: str, letters: str, init: Initializer) -> Array:
        shape = tuple(self.sizes[letter] for letter in letters)
        boxed = nn.with_logical_partitioning(init, axes.logical(letters))
        return self.param(name, boxed, shape).astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalises the last dimension in float32; comes back in the dtype of its input.

    Attributes:
      letter: The dimension normalised, for its logical axis.
      epsilon: Added to the variance.
    """

    letter: str
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        names, shape = axes.logical(self.letter), x.shape[-1:]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, names), shape
        )
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, names), shape)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU. By erf, not as `jax.nn.gelu` by erfc, which costs twice as much on CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes a share `rate` of the entries and scales the others up; all kept without a key.

    The share is rounded to 1/65536: one 32-bit draw decides on two entries, because drawing is
    most of what dropout costs on CPU.
    """
    if key is None or rate == 0.0:
        return x
    size, threshold = x.shape[-1], round(rate * 65536)
    drawn = jax.random.bits(key, (*x.shape[:-1], (size + 1) // 2), jnp.uint32)
    drawn = jnp.concatenate([drawn >> 16, drawn & 0xFFFF], axis=-1)[..., :size]
    return jnp.where(drawn >= threshold, x * (65536 / (65536 - threshold)), 0.0)


def attend(
    q: Float[Array, "p s h a"],
    k: Float[Array, "p t h a"],
    v: Float[Array, "p t h a"],
    mask: Bool[Array, "p s t"] | None,
    *,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "p s h a"]:
    """Scaled dot-product attention, softmax in float32; a row masked whole attends evenly.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      mask: Which keys a position may see; None: all.
      rate: Dropout of the attention weights.
      key: Draws what is dropped; None: nothing.
    """
    scores = jnp.einsum("psha,ptha->phst", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)  # [p, h, s]
    weights = dropout(weights, rate, key).astype(v.dtype)
    y = jnp.einsum("phst,ptha->psha", weights, v, preferred_element_type=jnp.float32)
    # Divided after the sum over keys: a pass over [s, t] less, forwards and backwards.
    return (y / total.transpose(0, 2, 1)[..., None]).astype(v.dtype)


def look_up(table: Float[Array, "w d"], ids: Int[Array, "p s"]) -> Float[Array, "p s d"]:
    """Rows of a table of embeddings; ids must be in range."""
    return jnp.asarray(table).at[ids].get(mode="promise_in_bounds")


def place_rows(
    x: Float[Array, "p s d"], rows: Float[Array, "i d"], at: Int[Array, "p s"]
) -> Float[Array, "p s d"]:
    """Puts `rows[at]` where `at >= 0`, and leaves `x` elsewhere.

    Args:
      x: States of the positions.
      rows: At least one row; each stands at most once.
      at: Row that stands at a position; -1 = none.
    """
    num_rows, shape = rows.shape[0], x.shape
    at = at.reshape(-1)
    where = jnp.full(num_rows, at.size).at[jnp.where(at >= 0, at, num_rows)]
    where = where.set(jnp.arange(at.size), mode="drop")  # Position of each row.
    flat = x.reshape(-1, shape[-1]).at[where].set(rows.astype(x.dtype), mode="drop")
    return flat.reshape(shape)


def mean_by_segment(
    x: Float[Array, "p s d"], segments: Int[Array, "p s"], num_segments: int
) -> Float[Array, "b d"]:
    """Mean of the positions of each segment, float32; zeros for a segment without any.

    Args:
      x: States of the positions.
      segments: Segment of each position; -1 = in none.
      num_segments: How many there are.
    """
    flat = jnp.where(segments >= 0, segments, num_segments).reshape(-1)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    total = jax.ops.segment_sum(rows, flat, num_segments)
    count = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.float32), flat, num_segments)
    return total / jnp.maximum(count, 1.0)[:, None]
