"""Frozen SigLIP and SigLIP 2 vision towers of fixed resolution: one vector per image.

Sources: arXiv 2303.15343, arXiv 2502.14786 and `transformers`' SiglipVisionModel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers
from vixml_jax.parallel import axis_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes and computation settings of a vision tower.

    Attributes:
      image_size: Height and width of an image in pixels.
      patch_size: Height and width of a patch in pixels; leftover pixels at the right and bottom
        edges are ignored.
      num_layers: Number of blocks.
      width: Width of the hidden states and of the output vector.
      num_heads: Number of attention heads; must divide `width`.
      mlp_width: Width of the feed-forward layers.
      layer_norm_eps: Added to variances.
      dtype: Computation dtype; norms and softmax are always float32.
      scan: Whether to scan over one compiled block instead of unrolling all blocks.
    """

    image_size: int = 224
    patch_size: int = 16
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"
    scan: bool = True
    remat = False  # Never trained.

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.num_heads} heads")

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axis_names.LETTERS` used by the tower's weights."""
        return {"d": self.width, "m": self.mlp_width, "h": self.num_heads,
                "a": self.width // self.num_heads, "s": self.num_patches, "j": 3,
                "y": self.patch_size, "x": self.patch_size, "z": 3}  # fmt: skip

    @property
    def attention_needs(self) -> attention_lib.Needs:
        """What the tower asks of the attention of its blocks."""
        heads, head_width = self.num_heads, self.width // self.num_heads
        return attention_lib.Needs(
            self.dtype, self.num_patches, heads, heads, head_width, packed=False
        )

    def einsum(self, equation: str, name: str) -> layers.Einsum:
        """A contraction with normally distributed initial weights."""
        init = nn.initializers.normal(0.02)
        return layers.Einsum(equation, self.sizes, init, dtype=self.dtype, name=name)

    def norm(self, name: str) -> layers.LayerNorm:
        """A layer norm of the hidden states."""
        return layers.LayerNorm("d", self.layer_norm_eps, name=name)


class Mlp(nn.Module):
    """The feed-forward layer of a block and of the pooling head."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "i s d"]) -> Float[Array, "i s d"]:
        c = self.config
        x = layers.gelu_tanh(c.einsum("isd,dm->ism", "up")(x))
        return c.einsum("ism,md->isd", "down")(x)


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each with a norm in front."""

    config: SiglipConfig
    attention: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "i s d"], unused: None
    ) -> tuple[Float[Array, "i s d"], None]:
        c = self.config
        y = c.norm("attention_norm")(x)
        q, k, v = (c.einsum("isd,dha->isha", name)(y) for name in ("query", "key", "value"))
        y = attention_lib.attend(q, k, v, None, implementation=self.attention)
        x = x + c.einsum("isha,had->isd", "out")(y)
        x = x + Mlp(c, name="mlp")(c.norm("mlp_norm")(x))
        return layers.constrain(x, "isd"), None


class Pool(nn.Module):
    """Attention pooling: one learnt query attends to all patches of an image."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "i s d"]) -> Float[Array, "i d"]:
        c = self.config
        boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), axis_names.logical("d"))
        probe = self.param("probe", boxed, (c.width,)).astype(c.dtype)
        x = jnp.concatenate([jnp.broadcast_to(probe, (x.shape[0], 1, c.width)), x], axis=1)
        qkv = c.einsum("isd,djha->isjha", "query_key_value")(x)
        q, k, v = qkv[:, :1, 0], qkv[:, 1:, 1], qkv[:, 1:, 2]
        y = attention_lib.attend(q, k, v, None)
        y = c.einsum("isha,had->isd", "out")(y)
        return (y + Mlp(c, name="mlp")(c.norm("norm")(y)))[:, 0]


class VisionTower(nn.Module):
    """Maps pixels to the vectors of `get_image_features`, which are not normalised.

    Attributes:
      config: Sizes and computation settings.
      attention: Implementation of the attention of the blocks.
    """

    config: SiglipConfig
    attention: str = attention_lib.XLA

    @classmethod
    def on(cls, device: jax.Device, config: SiglipConfig) -> "VisionTower":
        """A tower for programs on one device."""
        return cls(config, attention_lib.choose(config.attention_needs, device).implementation)

    @nn.compact
    def __call__(self, pixels: Float[Array, "i height width z"]) -> Float[Array, "i d"]:
        """Float32 vectors of images whose pixels are scaled as the checkpoint requires."""
        c = self.config
        side = c.image_size // c.patch_size
        x = pixels[:, : side * c.patch_size, : side * c.patch_size]
        x = x.reshape(-1, side, c.patch_size, side, c.patch_size, 3).swapaxes(2, 3)
        x = x.reshape(-1, c.num_patches, c.patch_size, c.patch_size, 3)
        x = c.einsum("isyxz,yxzd->isd", "patches")(x)
        boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), axis_names.logical("sd"))
        x = x + self.param("positions", boxed, (c.num_patches, c.width)).astype(c.dtype)
        x = layers.run_blocks(self, Block, x, (), None)
        return Pool(c, name="pool")(c.norm("final_norm")(x)).astype(jnp.float32)
