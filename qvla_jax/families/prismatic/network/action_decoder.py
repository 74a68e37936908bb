"""UniVLA's action decoder: attention pooling over hidden states, then one layer to the chunk.

Two pooling blocks (Set Transformer's pooling by attention, with norms after the sums): one learned
vector pools the states of the image; another, with the first result added, pools those of the
latent action tokens (UniVLA, arXiv 2505.06111, section 3.3).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.families.prismatic.config import LatentActionConfig
from qvla_jax.models.attention import DotProduct
from qvla_jax.models.linear import Linear

# Lower bound of the root mean square that a vector is divided by.
_MIN_RMS = 1e-8


class UnitRMSNorm(nnx.Module):
    """x / max(RMS(x), 1e-8) g: unlike the epsilon of Llama's norm, the bound changes no value."""

    def __init__(self, dim: int):
        self.g = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
        return x / jnp.maximum(rms, _MIN_RMS) * self.g[...].astype(x.dtype)[None, None]


class SwishGLU(nnx.Module):
    """value * SiLU(gate), both from one layer, the values first."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.project = Linear(dim, 2 * hidden, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t k"]:
        value, gate = jnp.split(self.project(x), 2, axis=-1)
        return value * jax.nn.silu(gate)


class MAPAttention(nnx.Module):
    """Seeds attend to the pooled inputs, and not to each other."""

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q = Linear(dim, dim, use_bias=False, rngs=rngs)
        self.kv = Linear(dim, 2 * dim, use_bias=False, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.attention = DotProduct()

    def __call__(
        self, seeds: Float[Array, "b s c"], x: Float[Array, "b t c"]
    ) -> Float[Array, "b s c"]:
        head_dim = seeds.shape[-1] // self.num_heads
        q = self.q(seeds).reshape(*seeds.shape[:2], self.num_heads, head_dim)
        k, v = jnp.split(self.kv(x), 2, axis=-1)
        k, v = (y.reshape(*x.shape[:2], self.num_heads, head_dim) for y in (k, v))
        return self.proj(self.attention(q, k, v).reshape(seeds.shape))


class MAPBlock(nnx.Module):
    """Pools states [b, t, k] into one vector [b, 1, c]."""

    def __init__(self, input_dim: int, config: LatentActionConfig, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.projection = Linear(input_dim, dim, rngs=rngs)
        self.latents = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, dim)))
        self.attn_norm = UnitRMSNorm(dim)
        self.attn = MAPAttention(dim, config.num_heads, rngs=rngs)
        self.mlp_norm = UnitRMSNorm(dim)
        self.mlp = nnx.List(
            [SwishGLU(dim, config.mlp_dim, rngs=rngs), Linear(config.mlp_dim, dim, rngs=rngs)]
        )

    def __call__(
        self, states: Float[Array, "b t k"], start: Float[Array, "b 1 c"] | None = None
    ) -> Float[Array, "b 1 c"]:
        """States -> the pooled vector.

        Args:
            states: what is pooled.
            start: added to the learned query vector.
        """
        learned = self.latents[...].astype(states.dtype)[None]
        x = jnp.broadcast_to(learned, (states.shape[0], *learned.shape[1:]))
        if start is not None:
            x = x + start
        x = self.attn_norm(x + self.attn(x, self.projection(states)))
        glu, out = self.mlp
        return self.mlp_norm(x + out(glu(x)))


class ActionDecoder(nnx.Module):
    """Hidden states over the image and the latent action tokens -> action chunk in [-1, 1]."""

    def __init__(
        self,
        llm_dim: int,
        action_horizon: int,
        action_dim: int,
        config: LatentActionConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.action_dim = action_dim
        self.latent_action_pool = MAPBlock(llm_dim, config, rngs=rngs)
        self.visual_pool = MAPBlock(llm_dim, config, rngs=rngs)
        self.proj = nnx.List([Linear(config.embed_dim, action_dim * action_horizon, rngs=rngs)])

    def __call__(
        self, latent_states: Float[Array, "b l k"], visual_states: Float[Array, "b t k"]
    ) -> Float[Array, "b h a"]:
        """States of the latent tokens and over the image -> normalized action chunk."""
        visual = self.visual_pool(visual_states)
        pooled = self.latent_action_pool(latent_states, start=visual)
        (linear,) = self.proj
        return jnp.tanh(linear(pooled)).reshape(len(pooled), -1, self.action_dim)
