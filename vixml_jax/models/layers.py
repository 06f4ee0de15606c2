"""Layers that towers share: contractions, norms, dropout, attention, table look-up, pooling."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.parallel import axis_names

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
    return nn.with_logical_constraint(x, axis_names.logical(letters))


class Einsum(nn.Module):
    """Contracts the input with a weight, as `equation` says, and adds a bias.

    The letters of the weight give its shape (through `sizes`) and its logical axes. The bias has
    the letters of the weight that the output keeps. With a rank, a low-rank map is added to the
    weight (LoRA, arXiv 2106.09685): the first half drawn as `torch.nn.Linear` draws, the second
    zero, so that a fresh adapter changes nothing.

    Attributes:
      equation: E.g. "psd,dha->psha".
      sizes: Size of each letter of the weight.
      kernel_init: Draws the weight, float32.
      bias_init: Draws the bias, float32.
      dtype: What is computed in.
      use_bias: Whether there is a bias.
      lora_rank: Rank of the adapter; 0: none.
      lora_scale: What the adapter's output is multiplied by.
    """

    equation: str
    sizes: Mapping[str, int]
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros
    dtype: str = "float32"
    use_bias: bool = True
    lora_rank: int = 0
    lora_scale: float = 1.0

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
        # As one product of matrices: XLA's CPU backend computes the gradient of the weight up to
        # three times slower where the input has more than one batch dimension.
        num_summed = math.prod(self.sizes[letter] for letter in summed)
        flat = x.astype(self.dtype).reshape(-1, num_summed)
        y = flat @ kernel.reshape(num_summed, -1)
        if self.lora_rank:
            down = self._param("lora_a", summed + "r", fan_in_uniform(num_summed))
            up = self._param("lora_b", "r" + kept, nn.initializers.zeros)
            low = flat @ down.reshape(num_summed, -1)
            y = y + low @ up.reshape(self.lora_rank, -1) * self.lora_scale
        if self.use_bias:
            y = y + self._param("bias", kept, self.bias_init).reshape(-1)
        return y.reshape(*x.shape[: len(batch)], *(self.sizes[letter] for letter in kept))

    def _param(self, name: str, letters: str, init: Initializer) -> Array:
        shape = tuple(self.sizes[letter] for letter in letters)
        boxed = nn.with_logical_partitioning(init, axis_names.logical(letters))
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
        names, shape = axis_names.logical(self.letter), x.shape[-1:]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, names), shape
        )
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, names), shape)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides the last dimension by its root mean square, in float32; comes back as it was.

    Attributes:
      letter: The dimension normalised, for its logical axis.
      epsilon: Added to the mean square.
      unit_offset: Whether the result is multiplied by 1 + the weight rather than by the weight.
    """

    letter: str
    epsilon: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        boxed = nn.with_logical_partitioning(init, axis_names.logical(self.letter))
        scale = self.param("scale", boxed, x.shape[-1:]).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * (scale + 1.0 if self.unit_offset else scale)).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU. By erf, not as `jax.nn.gelu` by erfc, which costs twice as much on CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation, as Gemma is trained."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": jax.nn.silu}


def turns(
    positions: Int[Array, "p s"], frequencies: Float[np.ndarray, " a/2"]
) -> tuple[Float[Array, "p s a/2"], Float[Array, "p s a/2"]]:
    """Cosine and sine of each position's angles, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "p s h a"], cos: Float[Array, "p s a/2"], sin: Float[Array, "p s a/2"]
) -> Float[Array, "p s h a"]:
    """Turns entry j of a head with entry j + a/2 (rotary embeddings, arXiv 2104.09864)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return turned.astype(x.dtype)


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


def attend_grouped(
    q: Float[Array, "p s h a"],
    k: Float[Array, "p t g a"],
    v: Float[Array, "p t g a"],
    mask: Bool[Array, "p s t"] | None,
    *,
    scale: float,
) -> Float[Array, "p s h a"]:
    """Attention whose query heads share key heads in equal groups; keys are not repeated.

    By cuDNN where it serves: on a GPU, in half precision. Without a mask all is seen.
    """
    heads = None if mask is None else mask[:, None]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    cudnn = jax.default_backend() == "gpu" and half
    return jax.nn.dot_product_attention(
        q, k, v, mask=heads, scale=scale, implementation="cudnn" if cudnn else "xla"
    )


def look_up(table: Float[Array, "w d"], ids: Int[Array, "p s"]) -> Float[Array, "p s d"]:
    """Rows of a table of embeddings; ids must be in range."""
    rows = jnp.asarray(table).at[ids].get(mode="promise_in_bounds")
    # Each device looks up its part of the width for all that share the table, and they deal it
    # out. Said here, so that the gradient comes back the same way: XLA would else gather the states
    # of all rows.
    return constrain(constrain(rows, "osd"), "psd")


def look_up_small(table: Float[Array, "t d"], at: Int[Array, "p s"]) -> Float[Array, "p s d"]:
    """As `look_up`, of a table so small that every device takes the whole of it."""
    whole = nn.with_logical_constraint(jnp.asarray(table), (None, None))
    return whole.at[at].get(mode="promise_in_bounds")


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


def sum_by_segment(
    x: Float[Array, "p s d"], segments: Int[Array, "p s"], num_segments: int
) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
    """Sum of the positions of each segment, float32, and how many they are.

    Args:
      x: States of the positions.
      segments: Segment of each position; -1 = in none.
      num_segments: How many there are.
    """
    flat = jnp.where(segments >= 0, segments, num_segments).reshape(-1)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    total = jax.ops.segment_sum(rows, flat, num_segments)
    return total, jax.ops.segment_sum(jnp.ones(flat.shape, jnp.float32), flat, num_segments)


def last_of_segments(segments: Int[Array, "p s"]) -> Int[Array, "p s"]:
    """Keeps the segment of its last position, and -1 elsewhere."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(segments != following, segments, -1)


def run_blocks(
    module: nn.Module,
    block: type[nn.Module],
    config: Any,
    x: Float[Array, "p s d"],
    shared: tuple[Any, ...],
    each: Any,
) -> Float[Array, "p s d"]:
    """Runs `config.num_layers` copies of a block, as submodule "blocks" of `module`.

    The parameters are stacked, `[layers, ...]`, however the copies are run: by a scan over one
    compiled block (`config.scan`), or written out one after another.

    Args:
      module: The caller, inside its compact method.
      block: Made as `block(config)`; maps (x, *shared, one of `each`) to (x, None).
      config: Has `num_layers`, `scan` and `remat`.
      x: What enters the first block.
      shared: What all blocks are given.
      each: What each block is given: an array of leading size `num_layers`, or None for nothing.
    """
    if config.scan or module.is_initializing():
        stack = nn.scan(
            nn.remat(block, prevent_cse=False) if config.remat else block,
            length=config.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(*(nn.broadcast for _ in shared), 0),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config, name="blocks")(x, *shared, each)[0]

    lone = block(config, parent=None)

    def run(weights: dict, x: Array, one: Any) -> Array:
        return lone.apply({"params": weights}, x, *shared, one)[0]

    if config.remat:
        run = jax.checkpoint(run)
    # One split an array: its transpose is one concatenation, where that of an index would add up
    # arrays of zeros as large as the stack, one a layer.
    stacked, tree = jax.tree.flatten(nn.unbox(module.variables["params"]["blocks"]))
    parts = [jax.lax.split(w, [1] * config.num_layers) for w in stacked]
    for i in range(config.num_layers):
        weights = jax.tree.unflatten(tree, [part[i].squeeze(0) for part in parts])
        x = run(weights, x, None if each is None else each[i])
    return x
