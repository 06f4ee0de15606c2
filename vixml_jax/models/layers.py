"""Layers shared by the towers: contractions, norms, dropout, lookup, pooling, stacks of blocks."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.parallel import axis_names

Initializer = Callable[..., Array]


def uniform(bound: float) -> Initializer:
    """An initializer that draws uniformly from [-bound, bound]."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_in_uniform(fan_in: int) -> Initializer:
    """The initializer of `torch.nn.Linear` for weight and bias: U(±1/sqrt(fan_in))."""
    return uniform(1.0 / math.sqrt(fan_in))


def constrain(x: Float[Array, "..."], letters: str) -> Float[Array, "..."]:
    """Constrains the sharding of an activation by its letters; no effect without a mesh."""
    return nn.with_logical_constraint(x, axis_names.logical(letters))


class Einsum(nn.Module):
    """Contracts the input with a weight by an einsum equation, and adds a bias.

    The letters of the weight give its shape (through `sizes`) and its logical axes. The bias has
    the letters of the weight that remain in the output. With `lora_rank` > 0 a low-rank adapter is
    added to the weight (LoRA, arXiv 2106.09685). Its first factor is initialised as
    `torch.nn.Linear` is, its second factor is zero, so a fresh adapter changes nothing.

    Attributes:
      equation: Einsum equation, e.g. "psd,dha->psha".
      sizes: Size of each letter of the weight.
      kernel_init: Initializer of the weight, float32.
      bias_init: Initializer of the bias, float32.
      dtype: Computation dtype.
      use_bias: Whether there is a bias.
      lora_rank: Rank of the adapter; 0 for none.
      lora_scale: Factor applied to the adapter's output.
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
        # A single matrix product: with more than one batch dimension XLA's CPU backend computes
        # the gradient of the weight up to three times slower.
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
    """Layer norm over the last dimension, computed in float32, returned in the input's dtype.

    Attributes:
      letter: Letter of the normalised dimension, for its logical axis.
      epsilon: Added to the variance.
      use_bias: Whether there is a bias.
    """

    letter: str
    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        names, shape = axis_names.logical(self.letter), x.shape[-1:]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, names), shape
        )
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * scale
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, names)
            y = y + self.param("bias", zeros, shape)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, computed in float32, returned in the input's dtype.

    Attributes:
      letter: Letter of the normalised dimension, for its logical axis.
      epsilon: Added to the mean square.
      unit_offset: Whether to multiply by 1 + the weight instead of by the weight.
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
    """Exact GELU, by erf; the erfc of `jax.nn.gelu` takes twice as long on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU, with which Gemma is trained."""
    return jax.nn.gelu(x, approximate=True)


POOLINGS = ("mean", "cls", "last", "weighted_mean")
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": jax.nn.silu}


def rope_angles(
    positions: Int[Array, "p s"], frequencies: Float[np.ndarray, " a/2"]
) -> tuple[Float[Array, "p s a/2"], Float[Array, "p s a/2"]]:
    """Cosines and sines of the rotation angles of each position, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "p s h a"], cos: Float[Array, "p s a/2"], sin: Float[Array, "p s a/2"]
) -> Float[Array, "p s h a"]:
    """Rotates each pair of entries j and j + a/2 of a head (RoPE, arXiv 2104.09864)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def kept(key: Key[Array, ""], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """Which entries dropout leaves: each is drawn on its own, and false with probability `rate`.

    The rate is rounded to a multiple of 1/65536: one 32-bit random number decides on two entries,
    because drawing random numbers is most of the cost of dropout on a CPU.
    """
    size = shape[-1]
    bits = jax.random.bits(key, (*shape[:-1], (size + 1) // 2), jnp.uint32)
    bits = jnp.concatenate([bits >> 16, bits & 0xFFFF], axis=-1)[..., :size]
    return bits >= round(rate * 65536)


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and scales up the others; identity without a key."""
    if key is None or rate == 0.0:
        return x
    scale = 65536 / (65536 - round(rate * 65536))
    return jnp.where(kept(key, x.shape, rate), x * scale, 0.0)


def look_up(table: Float[Array, "w d"], ids: Int[Array, "p s"]) -> Float[Array, "p s d"]:
    """Rows of an embedding table; ids must be in range."""
    rows = jnp.asarray(table).at[ids].get(mode="promise_in_bounds")
    # Each device looks up its slice of the width for all devices that share the table, and an
    # all-to-all follows. With both constraints the gradient takes the same way back; otherwise XLA
    # would gather the states of all rows.
    return constrain(constrain(rows, "osd"), "psd")


def look_up_small(table: Float[Array, "t d"], ids: Int[Array, "p s"]) -> Float[Array, "p s d"]:
    """As `look_up`, for a table small enough to be replicated on every device."""
    replicated = nn.with_logical_constraint(jnp.asarray(table), (None, None))
    return replicated.at[ids].get(mode="promise_in_bounds")


def place_rows(
    x: Float[Array, "p s d"], rows: Float[Array, "i d"], at: Int[Array, "p s"]
) -> Float[Array, "p s d"]:
    """`x` with `rows[at]` wherever `at >= 0`.

    Args:
      x: Hidden states.
      rows: At least one row; each is used at most once.
      at: Index of the row at each position; -1 for none.
    """
    num_rows, shape = rows.shape[0], x.shape
    at = at.reshape(-1)
    target = jnp.full(num_rows, at.size).at[jnp.where(at >= 0, at, num_rows)]
    target = target.set(jnp.arange(at.size), mode="drop")  # Position of each row.
    flat = x.reshape(-1, shape[-1]).at[target].set(rows.astype(x.dtype), mode="drop")
    return flat.reshape(shape)


def pooling_weights(
    kind: str,
    segments: Int[Array, "p s"],
    positions: Int[Array, "p s"],
    image_at: Int[Array, "p s"],
) -> Float[Array, "p s"] | None:
    """The weight of each state in the vector of its item, which is their weighted mean.

    Args:
      kind: "mean" of all states; "cls": the state of the first token; "last": the last state;
        "weighted_mean": the n-th state of an item weighs n (arXiv 2202.08904).
      segments: Item at each position; -1 for none.
      positions: Position within the item.
      image_at: Image at each position; -1 for a token.

    Returns:
      The weights, or None if all are one.
    """
    if kind == "mean":
        return None
    if kind == "last":
        return (last_of_segments(segments) >= 0).astype(jnp.float32)
    same = segments[:, :, None] == segments[:, None, :]
    until = same & (positions[:, None, :] <= positions[:, :, None])  # Position t is not after s.
    if kind == "weighted_mean":
        return jnp.sum(until, axis=-1, dtype=jnp.float32)
    if kind != "cls":
        raise ValueError(f"unknown pooling {kind!r}: expected one of {', '.join(POOLINGS)}")
    token = (image_at < 0) & (segments >= 0)
    rank = jnp.sum(until & token[:, None, :], axis=-1)
    return (token & (rank == 1)).astype(jnp.float32)


def sum_by_segment(
    x: Float[Array, "p s d"],
    segments: Int[Array, "p s"],
    num_segments: int,
    weights: Float[Array, "p s"] | None = None,
) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
    """Sum of the hidden states of each segment, and of their weights, both float32.

    Args:
      x: Hidden states.
      segments: Segment of each position; -1 for none.
      num_segments: Number of segments.
      weights: Weight of each state; None: one.
    """
    flat = jnp.where(segments >= 0, segments, num_segments).reshape(-1)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if weights is None:
        flat_weights = jnp.ones(flat.shape, jnp.float32)
    else:
        flat_weights = weights.reshape(-1)
        rows = rows * flat_weights[:, None]
    total = jax.ops.segment_sum(rows, flat, num_segments)
    return total, jax.ops.segment_sum(flat_weights, flat, num_segments)


def last_of_segments(segments: Int[Array, "p s"]) -> Int[Array, "p s"]:
    """The segment at the last position of each segment, and -1 elsewhere."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(segments != following, segments, -1)


def run_blocks(
    module: nn.Module,
    block: type[nn.Module],
    x: Float[Array, "p s d"],
    shared: tuple[Any, ...],
    each: Any,
) -> Float[Array, "p s d"]:
    """Applies `num_layers` blocks in turn, as submodule "blocks" of `module`.

    The parameters are stacked, `[layers, ...]`, whether the blocks are scanned (`config.scan`) or
    unrolled. Unrolled blocks also take those of `unstacked`.

    Args:
      module: The calling module, inside its compact method. Its `config` has `num_layers`, `scan`
        and `remat`; `attention` is the implementation of its attention.
      block: Module class; `block(config, attention)` maps (x, *shared, each[i]) to (x, None).
      x: Input of the first block.
      shared: Arguments passed to every block.
      each: Argument that differs by block: arrays of leading size `num_layers`; None for none.
    """
    config, attention = module.config, module.attention
    if config.scan or module.is_initializing():
        stack = nn.scan(
            nn.remat(block, prevent_cse=False) if config.remat else block,
            length=config.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(*(nn.broadcast for _ in shared), 0),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config, attention, name="blocks")(x, *shared, each)[0]

    unbound = block(config, attention, parent=None)

    def run(weights: dict, x: Array, argument: Any) -> Array:
        return unbound.apply({"params": weights}, x, *shared, argument)[0]

    if config.remat:
        run = jax.checkpoint(run)
    # The transpose of a split is one concatenation. The transpose of indexing would add up one
    # array of zeros as large as the stack for each layer.
    blocks = nn.unbox(module.variables["params"]["blocks"])
    if "0" not in blocks:
        blocks = _of_layers(
            blocks, lambda w: [x.squeeze(0) for x in jax.lax.split(w, [1] * config.num_layers)]
        )
    for i in range(config.num_layers):
        x = run(blocks[str(i)], x, jax.tree.map(operator.itemgetter(i), each))
    return x


def _of_layers(blocks: Any, split: Callable[[Array], Sequence[Array]]) -> dict[str, Any]:
    """The parameters of each block, by its number, from those of all blocks."""
    stacks, tree = jax.tree.flatten(blocks)
    layers = zip(*map(split, stacks), strict=True)
    return {str(i): jax.tree.unflatten(tree, layer) for i, layer in enumerate(layers)}


def unstacked(params: Any) -> Any:
    """Parameters in which each block has arrays of its own, for `run_blocks` without scanning.

    A program copies the layers that it takes out of a stack, each time that it runs. For a few
    short texts on a CPU, that takes as long as all else.

    Args:
      params: Of a tower, on devices, or their shapes and dtypes; stacked, without boxes.
    """
    if not isinstance(params, dict):
        return params
    return {
        name: _of_layers(value, _split) if name == "blocks" else unstacked(value)
        for name, value in params.items()
    }


def stacked(params: Any) -> Any:
    """The inverse of `unstacked`; parameters that are stacked stay as they are."""
    if not isinstance(params, dict):
        return params
    if "0" in params:
        return jax.tree.map(lambda *x: jnp.stack(x), *(params[str(i)] for i in range(len(params))))
    return {name: stacked(value) for name, value in params.items()}


def is_unstacked(params: Any) -> bool:
    """Whether parameters are those of `unstacked`."""
    return isinstance(params, dict) and ("0" in params or any(map(is_unstacked, params.values())))


def abstract_like(params: Any, abstract: Any) -> Any:
    """Shapes and dtypes of stacked parameters, unstacked if some parameters are; without boxes."""
    abstract = nn.unbox(abstract)
    return unstacked(abstract) if is_unstacked(params) else abstract


def _split(stack: Array | jax.ShapeDtypeStruct) -> list[Any]:
    """The layers of a stack, each sharded as in the stack."""
    if isinstance(stack, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)] * stack.shape[0]
    layer = stack.sharding
    if isinstance(layer, NamedSharding):
        layer = NamedSharding(layer.mesh, PartitionSpec(*layer.spec[1:]))
    return jax.device_put([*np.asarray(stack)], layer)


def unit(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Rows scaled to unit length; a zero row stays zero (floor 1e-12, as in the paper's code)."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / norm


def prefix(x: Float[Array, "... e"], width: int) -> Float[Array, "... w"]:
    """The first columns of unit vectors, of unit length again; all columns are left as they are."""
    return x if width == x.shape[-1] else unit(x[..., :width])
