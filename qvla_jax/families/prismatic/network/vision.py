"""The vision towers: pre-norm ViTs as timm builds DINOv2 (with registers) and SigLIP.

Reference: `PrismaticVisionBackbone` of OpenVLA. `featurizer` is DINOv2 and `fused_featurizer`
SigLIP; the feature is the output of one inner block, without final norm or prefix tokens, and the
two towers' features are concatenated on channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float, UInt8
from qvla_jax.families.prismatic.config import VisionTowerConfig
from qvla_jax.models.attention import DotProduct
from qvla_jax.models.linear import Linear


class PatchEmbed(nnx.Module):
    """Non-overlapping patches through one linear map.

    The public convolution `[c, 3, p, p]` with stride p is this matrix `[3 p p, c]`; pixels of a
    patch are ordered (channel, row, column), as in the flattened public weight.
    """

    def __init__(self, config: VisionTowerConfig, *, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        self.proj = Linear(3 * config.patch_size**2, config.embed_dim, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b t c"]:
        b, height, width, _ = pixels.shape
        p = self.patch_size
        rows, cols = height // p, width // p
        patches = pixels.reshape(b, rows, p, cols, p, 3).transpose(0, 1, 3, 5, 2, 4)
        return self.proj(patches.reshape(b, rows * cols, 3 * p * p))


class Attention(nnx.Module):
    """Multi-head self-attention with one fused qkv layer."""

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.attention = DotProduct()

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, t, 3, self.num_heads, -1), 2, 0)
        return self.proj(self.attention(q, k, v).reshape(b, t, c))


class Mlp(nnx.Module):
    """Two layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, hidden_dim, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class LayerScale(nnx.Module):
    """A learned factor for each channel of a residual branch (DINOv2)."""

    def __init__(self, dim: int):
        self.scale_factor = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return x * self.scale_factor[...].astype(x.dtype)[None, None]


def _layer_norm(dim: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The one-pass variance loses digits that parity with the reference needs.
    return nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionTowerConfig, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.norm1 = _layer_norm(dim, rngs)
        self.attn = Attention(dim, config.num_heads, rngs=rngs)
        self.ls1 = LayerScale(dim) if config.layer_scale else None
        self.norm2 = _layer_norm(dim, rngs)
        self.mlp = Mlp(dim, config.mlp_dim, rngs=rngs)
        self.ls2 = LayerScale(dim) if config.layer_scale else None

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.transform(self.attend(x))

    def attend(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        """The attention half, residual included."""
        y = self.attn(self.norm1(x))
        return x + (y if self.ls1 is None else self.ls1(y))

    def transform(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        """The MLP half, residual included."""
        y = self.mlp(self.norm2(x))
        return x + (y if self.ls2 is None else self.ls2(y))


class FiLMedBlock(nnx.Module):
    """A block whose residual stream is modulated by language between attention and MLP.

    x <- x (1 + gamma) + beta, gamma and beta linear in the mean language embedding; prefix tokens
    included (OpenVLA-OFT's `FiLMedVisionTransformerBlock`).
    """

    def __init__(self, config: VisionTowerConfig, language_dim: int, *, rngs: nnx.Rngs):
        self.block = Block(config, rngs=rngs)
        self.scale = Linear(language_dim, config.embed_dim, rngs=rngs)
        self.shift = Linear(language_dim, config.embed_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t c"], language: Float[Array, "b l"]
    ) -> Float[Array, "b t c"]:
        gamma, beta = self.scale(language)[:, None], self.shift(language)[:, None]
        x = self.block.attend(x)
        return self.block.transform(x * (1.0 + gamma) + beta)


class AttentionPool(nnx.Module):
    """SigLIP's pooling head: stored in the public checkpoints, never run by a policy."""

    def __init__(self, config: VisionTowerConfig, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.latent = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, dim)))
        self.q = Linear(dim, dim, rngs=rngs)
        self.kv = Linear(dim, 2 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.norm = _layer_norm(dim, rngs)
        self.mlp = Mlp(dim, config.mlp_dim, rngs=rngs)


class VisionTransformer(nnx.Module):
    """One tower; returns the patch features of an inner block."""

    def __init__(self, config: VisionTowerConfig, language_dim: int | None, *, rngs: nnx.Rngs):
        self.config = config
        dim = config.embed_dim
        init = nnx.initializers.normal(0.02)
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.pos_embed = nnx.Param(init(rngs.params(), (1, config.num_patches, dim)))
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, dim))) if config.class_token else None
        self.reg_token = (
            nnx.Param(init(rngs.params(), (1, config.num_registers, dim)))
            if config.num_registers
            else None
        )
        self.blocks = nnx.List(
            [
                Block(config, rngs=rngs)
                if language_dim is None
                else FiLMedBlock(config, language_dim, rngs=rngs)
                for _ in range(config.depth)
            ]
        )
        self.norm = _layer_norm(dim, rngs) if config.final_norm else None
        self.attn_pool = AttentionPool(config, rngs=rngs) if config.attention_pool else None

    def __call__(
        self, images: UInt8[Array, "b H W 3"], language: Float[Array, "b l"] | None = None
    ) -> Float[Array, "b t c"]:
        mean = jnp.asarray(self.config.mean, jnp.float32)
        std = jnp.asarray(self.config.std, jnp.float32)
        pixels = (images.astype(jnp.float32) / 255.0 - mean[None, None, None]) / std[
            None, None, None
        ]
        x = self.patch_embed(pixels)
        # Only patches have positions: prefix tokens are prepended afterwards.
        x = x + self.pos_embed[...].astype(x.dtype)
        prefix = [
            jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], *token.shape[1:]))
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        x = jnp.concatenate([*prefix, x], axis=1)
        blocks: list[Any] = list(self.blocks)  # of either kind, or wrapped by instrumentation
        for block in blocks[: self.config.feature_block + 1]:
            x = block(x) if language is None else block(x, language)
        return x[:, x.shape[1] - self.config.num_patches :]


class VisionBackbone(nnx.Module):
    """Both towers over all images, features concatenated on channels."""

    def __init__(
        self,
        configs: tuple[VisionTowerConfig, VisionTowerConfig],
        *,
        language_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.featurizer = VisionTransformer(configs[0], language_dim, rngs=rngs)
        self.fused_featurizer = VisionTransformer(configs[1], language_dim, rngs=rngs)

    def __call__(
        self,
        images: UInt8[Array, "b v H W 3"],
        language: Float[Array, "b l"] | None = None,
    ) -> Float[Array, "b v*t c"]:
        """Images of v cameras (and the mean language embedding, with FiLM) -> patch features.

        Args:
            images: [b, v, H, W, 3].
            language: [b, l]; every image of an observation is modulated by the same.

        Returns:
            [b, v t, c1 + c2].
        """
        b, v = images.shape[:2]
        flat = images.reshape(-1, *images.shape[2:])
        if language is not None:
            language = jnp.repeat(language, v, axis=0)
        features = jnp.concatenate(
            [self.featurizer(flat, language), self.fused_featurizer(flat, language)], axis=-1
        )
        return features.reshape(b, -1, features.shape[-1])
