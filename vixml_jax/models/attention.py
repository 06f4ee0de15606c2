"""Attention of the towers, and which implementation computes it on which device.

Fused implementations keep the scores [p h s t] on the chip: cuDNN's on NVIDIA GPUs, and splash
attention on TPUs. XLA's writes them to memory and runs anywhere. The choice is made before a
program is traced, from the device that the program is for, which need not exist on this machine.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.models import layers
from vixml_jax.parallel import axis_names

XLA, CUDNN, SPLASH = "xla", "cudnn", "splash"
# Rows from this width on take splash attention. In shorter ones XLA fuses the scores into one
# operation: it needs 0.3 MiB where splash attention needs 133, for 64 rows of 128 and 12 heads.
SPLASH_WIDTH = 512
_LANES = 128  # Positions of a row are a multiple of this in splash attention.
_GPUS = ("gpu", "cuda")  # `jax.Device.platform` of NVIDIA GPUs.


class Needs(NamedTuple):
    """What a tower asks of its attention.

    Attributes:
      dtype: Computation dtype.
      row_width: Number of positions of a row, queries and keys alike.
      num_heads: Number of query heads.
      num_kv_heads: Number of key and value heads, which divides that of query heads.
      head_width: Width of one head.
      causal: Whether a position attends only to itself and earlier ones.
      packed: Whether rows hold several items, which do not attend to one another.
      beyond_items: What else decides which keys a position attends to, or how much, such as
        "sliding windows"; empty for nothing.
    """

    dtype: str
    row_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    causal: bool = False
    packed: bool = True
    beyond_items: str = ""


class Choice(NamedTuple):
    """An implementation of attention.

    Attributes:
      implementation: `XLA`, `CUDNN` or `SPLASH`.
      reason: Why no fused implementation was chosen; empty if one was.
    """

    implementation: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})" if self.reason else self.implementation


def choose(needs: Needs, device: Any, tensor: int = 1) -> Choice:
    """The implementation of a tower's attention on a device.

    Args:
      needs: What the tower asks for.
      device: A device that the program is compiled for: its `platform` and, of a GPU, its
        `compute_capability` are read.
      tensor: Number of devices that heads are sharded over.
    """
    fused = CUDNN if device.platform in _GPUS else SPLASH if device.platform == "tpu" else ""
    if not fused:
        return Choice(XLA, f"no fused attention on {device.platform}")
    obstacle = _common_obstacle(needs, tensor) or (
        _cudnn_obstacle(needs, device) if fused == CUDNN else _splash_obstacle(needs)
    )
    return Choice(XLA, obstacle) if obstacle else Choice(fused)


def _common_obstacle(needs: Needs, tensor: int) -> str:
    if needs.dtype != "bfloat16":
        return f"fused attention needs bfloat16, found {needs.dtype}"
    if needs.num_heads % tensor or needs.num_kv_heads % tensor:
        heads = f"{needs.num_heads} heads and {needs.num_kv_heads} key/value heads"
        return f"the tensor axis of size {tensor} does not divide {heads}"
    return ""


def _cudnn_obstacle(needs: Needs, device: Any) -> str:
    """Why cuDNN cannot compute the attention; the limits are those of NVIDIA's support matrix."""
    found = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", found):
        return "the compute capability of the GPU is unknown"
    capability = tuple(map(int, found.split(".")))
    if capability < (8, 0):
        return f"cuDNN's attention needs compute capability 8.0, found {found}"
    # Wider heads have a backward pass on Hopper alone. For them JAX asks the GPU of this machine,
    # while it traces, so that the program cannot be compiled for one that is elsewhere.
    widest = 256 if capability[0] == 9 and device in jax.devices() else 128
    if needs.head_width % 8 or needs.head_width > widest:
        absent = ", without the GPU" if capability[0] == 9 and widest == 128 else ""
        return (
            f"heads of width {needs.head_width}: cuDNN takes multiples of 8 up to {widest} on "
            f"compute capability {found}{absent}"
        )
    if needs.packed and needs.row_width % 2:
        return f"cuDNN's masks need rows of an even width, found {needs.row_width}"
    return ""


def _splash_obstacle(needs: Needs) -> str:
    """Why splash attention cannot compute the attention, or would not make it faster."""
    if needs.row_width < SPLASH_WIDTH:
        return f"rows of {needs.row_width} are shorter than {SPLASH_WIDTH}"
    if needs.row_width % _LANES:
        return f"splash attention needs rows of a multiple of {_LANES}, found {needs.row_width}"
    if needs.beyond_items:
        return f"splash attention has no {needs.beyond_items}"
    return ""


def within_items(
    segments: Int[Array, "p s"], implementation: str, *, causal: bool = False
) -> Bool[Array, "p s s"] | Int[Array, "p s"]:
    """Which keys each position may attend to: those of its item, and only earlier ones if causal.

    Empty positions attend to one another, so that no position is without keys. Nothing reads their
    states.

    Args:
      segments: Item at each position; -1 for empty positions.
      implementation: That of `choose`. Splash attention reads the segments themselves.
      causal: Whether a position attends only to itself and earlier ones.
    """
    if implementation == SPLASH:
        return segments
    mask = segments[:, :, None] == segments[:, None, :]
    return mask & jnp.tril(jnp.ones(mask.shape[1:], bool)) if causal else mask


def hide_keys(
    mask: Bool[Array, "p s s"], rate: float, key: Key[Array, ""] | None
) -> Bool[Array, "p s s"]:
    """Hides each key from each position with probability `rate`; the mask itself without a key.

    This is the dropout of attention weights: before the softmax, so that the weights of the keys
    that are left sum to one (DropKey, arXiv 2208.02646), and the same for all heads. A position
    always sees itself.
    """
    if key is None or rate == 0.0:
        return mask
    kept = layers.kept(key, mask.shape, rate)
    return mask & (kept | jnp.eye(mask.shape[-1], dtype=bool))


def attend(
    q: Float[Array, "p s h a"],
    k: Float[Array, "p t g a"],
    v: Float[Array, "p t g a"],
    allowed: Bool[Array, "p s t"] | Int[Array, "p s"] | None,
    *,
    scale: float | None = None,
    bias: Float[Array, "p h s t"] | None = None,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    implementation: str = XLA,
    causal: bool = False,
) -> Float[Array, "p s h a"]:
    """Scaled dot-product attention with softmax in float32.

    Equal groups of query heads share a key head. A position whose keys are all masked attends to
    all keys evenly.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      allowed: Which keys each position may attend to; None for all. For splash attention, the item
        at each position instead.
      scale: Factor of the scores; None for the root of the head width, inverted.
      bias: Added to the scaled scores; None for nothing.
      rate: Dropout rate of the attention weights, after the softmax; only XLA's has it.
      key: Random key of the dropout; None for no dropout.
      implementation: That of `choose`.
      causal: Whether splash attention hides later keys; elsewhere `allowed` says it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == SPLASH:
        return _splash(q, k, v, allowed, scale=scale, causal=causal)
    mask = None if allowed is None else allowed[:, None]
    if implementation == CUDNN:
        return _cudnn(q, k, v, mask, bias, scale=scale)
    if q.shape[2] != k.shape[2]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")
    scores = jnp.einsum("psha,ptha->phst", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)  # [p, h, s]
    weights = layers.dropout(weights, rate, key).astype(v.dtype)
    y = jnp.einsum("phst,ptha->psha", weights, v, preferred_element_type=jnp.float32)
    # Normalised after the sum over keys, which saves a pass over [s, t] in both directions.
    return (y / total.transpose(0, 2, 1)[..., None]).astype(v.dtype)


def _on_each_device(
    function: Callable[..., Array], inputs: Sequence[str], output: str
) -> Callable[..., Array]:
    """The function applied by each device to its rows and heads; as it is without a mesh.

    Args:
      function: Of arrays; neither rows nor heads affect each other.
      inputs: Letters of each argument; see `axis_names.LETTERS`.
      output: Letters of the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    *specs, out = (nn.logical_to_mesh_axes(axis_names.logical(x)) for x in (*inputs, output))
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out, check_vma=False)


def _cudnn(
    q: Float[Array, "p s h a"],
    k: Float[Array, "p t g a"],
    v: Float[Array, "p t g a"],
    mask: Bool[Array, "p 1 s t"] | None,
    bias: Float[Array, "p h s t"] | None,
    *,
    scale: float,
) -> Float[Array, "p s h a"]:
    arrays, letters = [q, k, v], ["psha", "ptga", "ptga"]
    names = []
    if mask is not None:
        arrays, letters, names = [*arrays, mask], [*letters, "pjst"], ["mask"]
    if bias is not None:
        arrays, letters = [*arrays, bias.astype(q.dtype)], [*letters, "phst"]
        names = [*names, "bias"]

    def local(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, implementation="cudnn", **dict(zip(names, rest, strict=True))
        )

    return _on_each_device(local, letters, "psha")(*arrays)


def _splash(
    q: Float[Array, "p s h a"],
    k: Float[Array, "p s g a"],
    v: Float[Array, "p s g a"],
    segments: Int[Array, "p s"] | None,
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "p s h a"]:
    # Imported where it is used: the import takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    width = q.shape[1]
    block = next(size for size in (512, 256, _LANES) if width % size == 0)
    blocks = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    one_head = (masks.CausalMask if causal else masks.FullMask)((width, width))

    def local(q: Array, k: Array, v: Array, *segments: Array) -> Array:
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([one_head] * q.shape[2]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
        )

        def row(q: Array, k: Array, v: Array, *segments: Array) -> Array:
            ids = kernels.SegmentIds(*segments, *segments) if segments else None
            return kernel(q, k, v, segment_ids=ids)

        heads_first = ((x.swapaxes(1, 2)) for x in ((q * scale).astype(q.dtype), k, v))
        return jax.vmap(row)(*heads_first, *segments).swapaxes(1, 2)

    rest = () if segments is None else (segments,)
    letters = ["psha", "psga", "psga", *("ps" for _ in rest)]
    return _on_each_device(local, letters, "psha")(q, k, v, *rest)
