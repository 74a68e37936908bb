"""The vision tower of pi0 and pi0.5: SigLIP as big_vision builds it, without pooling.

Module paths are the public names (`openpi.names`); layers are unrolled.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.families.openpi.config import SiglipConfig
from qvla_jax.models.attention import DotProduct
from qvla_jax.models.linear import Linear


class MlpBlock(nnx.Module):
    """Two layers around a tanh GELU."""

    def __init__(self, config: SiglipConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.Dense_0 = Linear(config.width, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.Dense_1 = Linear(config.mlp_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.Dense_1(jax.nn.gelu(self.Dense_0(x), approximate=True))


class MultiHeadAttention(nnx.Module):
    """Self-attention; every token attends to every one."""

    def __init__(self, config: SiglipConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width = config.width
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.attention = DotProduct()

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        q, k, v = (
            layer(x).reshape(b, t, self.num_heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(self.attention(q, k, v).reshape(b, t, c))


class LayerNorm(nnx.LayerNorm):
    """In float32, whatever the dtype of the tokens."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        super().__init__(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"], *, mask: Any = None) -> Float[Array, "b t c"]:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: SiglipConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.LayerNorm_0 = LayerNorm(config.width, rngs=rngs)
        self.MultiHeadDotProductAttention_0 = MultiHeadAttention(config, dtype=dtype, rngs=rngs)
        self.LayerNorm_1 = LayerNorm(config.width, rngs=rngs)
        self.MlpBlock_0 = MlpBlock(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.MultiHeadDotProductAttention_0(self.LayerNorm_0(x))
        return x + self.MlpBlock_0(self.LayerNorm_1(x))


class Encoder(nnx.Module):
    """The blocks and the norm behind them."""

    def __init__(self, config: SiglipConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.encoderblock = nnx.List(
            [EncoderBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.encoder_norm = LayerNorm(config.width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        for block in self.encoderblock:
            x = block(x)
        return self.encoder_norm(x)


class Siglip(nnx.Module):
    """Pixels in [-1, 1] -> one token for each patch, in the language model's width.

    Patches and positions are embedded in float32 whatever the dtype of the rest, as in openpi.
    """

    def __init__(self, config: SiglipConfig, out_width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        self.dtype = dtype
        fan_in = config.patch_size**2 * 3
        self.embedding = Linear(fan_in, config.width, dtype=jnp.float32, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.pos_embedding = nnx.Param(init(rngs.params(), (1, config.num_patches, config.width)))
        self.Transformer = Encoder(config, dtype=dtype, rngs=rngs)
        self.head = Linear(config.width, out_width, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b t c"]:
        return self.head(self.Transformer(self.embed(pixels)))

    def embed(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b t c"]:
        """Patches with their positions; what the first block takes."""
        b, height, width, _ = pixels.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        # Pixels of a patch in the order of the public kernel: row, column, channel.
        patches = pixels.reshape(b, rows, p, columns, p, 3).swapaxes(2, 3)
        x = self.embedding(patches.reshape(b, rows * columns, p * p * 3))
        return (x + self.pos_embedding[...].astype(x.dtype)).astype(self.dtype)
