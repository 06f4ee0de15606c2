"""SigLIP and SigLIP 2 vision towers of fixed resolution, frozen: pixels to one vector a picture.

Sources: arXiv 2303.15343, arXiv 2502.14786 and `transformers`' SiglipVisionModel.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vixml_jax.models import layers
from vixml_jax.parallel import axis_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of a vision tower, and how it is computed.

    Attributes:
      image_size: Height and width of a picture, in pixels.
      patch_size: Height and width of a patch; pixels left over at the far edges are not seen.
      num_layers: Blocks.
      width: Of the states, and of the vector that comes out.
      num_heads: Attention heads; a divisor of `width`.
      mlp_width: Of the feed-forward layers.
      layer_norm_eps: Added to variances.
      dtype: What is computed in; norms and softmax are float32 always.
      scan: Loop over one compiled block. Off: all blocks written out.
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
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axes.LETTERS` that a weight of the tower has."""
        return {"d": self.width, "m": self.mlp_width, "h": self.num_heads,
                "a": self.width // self.num_heads, "s": self.num_patches, "j": 3,
                "y": self.patch_size, "x": self.patch_size, "z": 3}  # fmt: skip

    def einsum(self, equation: str, name: str) -> layers.Einsum:
        """A contraction with fresh weights."""
        init = nn.initializers.normal(0.02)
        return layers.Einsum(equation, self.sizes, init, dtype=self.dtype, name=name)

    def norm(self, name: str) -> layers.LayerNorm:
        """A normalisation of the states."""
        return layers.LayerNorm("d", self.layer_norm_eps, name=name)


class Mlp(nn.Module):
    """The feed-forward layer of a block and of the head."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "i s d"]) -> Float[Array, "i s d"]:
        c = self.config
        x = layers.gelu_tanh(c.einsum("isd,dm->ism", "up")(x))
        return c.einsum("ism,md->isd", "down")(x)


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each normalised before."""

    config: SiglipConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "i s d"], nothing: None
    ) -> tuple[Float[Array, "i s d"], None]:
        c = self.config
        y = c.norm("attention_norm")(x)
        q, k, v = (c.einsum("isd,dha->isha", name)(y) for name in ("query", "key", "value"))
        y = layers.attend_grouped(q, k, v, None, scale=q.shape[-1] ** -0.5)
        x = x + c.einsum("isha,had->isd", "out")(y)
        x = x + Mlp(c, name="mlp")(c.norm("mlp_norm")(x))
        return layers.constrain(x, "isd"), None


class Pool(nn.Module):
    """One learnt query attends to all patches of a picture."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "i s d"]) -> Float[Array, "i d"]:
        c = self.config
        boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), axis_names.logical("d"))
        probe = self.param("probe", boxed, (c.width,)).astype(c.dtype)
        x = jnp.concatenate([jnp.broadcast_to(probe, (x.shape[0], 1, c.width)), x], axis=1)
        found = c.einsum("isd,djha->isjha", "query_key_value")(x)
        q, k, v = found[:, :1, 0], found[:, 1:, 1], found[:, 1:, 2]
        y = layers.attend_grouped(q, k, v, None, scale=q.shape[-1] ** -0.5)
        y = c.einsum("isha,had->isd", "out")(y)
        return (y + Mlp(c, name="mlp")(c.norm("norm")(y)))[:, 0]


class VisionTower(nn.Module):
    """Pixels in, one vector a picture out, as `get_image_features` gives it: not normalised."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "i height width z"]) -> Float[Array, "i d"]:
        """Vectors, float32, of pictures whose pixels were scaled as the checkpoint asks for."""
        c = self.config
        side = c.image_size // c.patch_size
        x = pixels[:, : side * c.patch_size, : side * c.patch_size]
        x = x.reshape(-1, side, c.patch_size, side, c.patch_size, 3).swapaxes(2, 3)
        x = x.reshape(-1, c.num_patches, c.patch_size, c.patch_size, 3)
        x = c.einsum("isyxz,yxzd->isd", "patches")(x)
        boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), axis_names.logical("sd"))
        x = x + self.param("positions", boxed, (c.num_patches, c.width)).astype(c.dtype)
        x = layers.run_blocks(self, Block, c, x, (), None)
        return Pool(c, name="pool")(c.norm("final_norm")(x)).astype(jnp.float32)
