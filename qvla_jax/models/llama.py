"""Llama decoder, as in Hugging Face's `LlamaForCausalLM`.

The mask is an argument: OpenVLA runs it causally, OpenVLA-OFT lets every position attend to every
position that is not padding.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float, Int
from qvla_jax.config import LlamaConfig
from qvla_jax.models.attention import attention
from qvla_jax.models.linear import Linear


def rotary_angles(
    positions: Int[Array, "b t"], head_dim: int, theta: float
) -> tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]]:
    """Cosines and sines of the half-split rotary embedding, r = head_dim / 2."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[:, :, None].astype(jnp.float32) * (1.0 / theta**exponent)[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def apply_rotary(
    x: Float[Array, "b t n d"],
    angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
) -> Float[Array, "b t n d"]:
    """Rotates the two halves of each head against each other."""
    cos, sin = (a.astype(x.dtype) for a in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class LlamaAttention(nnx.Module):
    """Self-attention with rotary positions and optional grouped key-value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        head_dim = config.hidden_size // config.num_attention_heads
        kv_dim = head_dim * config.num_key_value_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size, use_bias=False, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv_dim, use_bias=False, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv_dim, use_bias=False, rngs=rngs)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
        mask: Bool[Array, "b 1 #t s"],
    ) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        head_dim = c // self.config.num_attention_heads
        q, k, v = (
            proj(x).reshape(b, t, -1, head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        y = attention(q, k, v, mask)
        return self.o_proj(y.reshape(b, t, c))


class LlamaMLP(nnx.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dim, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.up_proj = Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.down_proj = Linear(hidden, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(dim, epsilon=eps, rngs=rngs)
        self.self_attn = LlamaAttention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(dim, epsilon=eps, rngs=rngs)
        self.mlp = LlamaMLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
        mask: Bool[Array, "b 1 #t s"],
    ) -> Float[Array, "b t c"]:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nnx.Module):
    """Token embeddings, decoder layers and the final norm."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List(
            [LlamaDecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

    def __call__(
        self, embeddings: Float[Array, "b t c"], mask: Bool[Array, "b 1 #t t"]
    ) -> Float[Array, "b t c"]:
        """Embeddings [b, t, c] at positions 0..t-1 -> final-norm hidden states [b, t, c]."""
        b, t, _ = embeddings.shape
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        angles = rotary_angles(positions, head_dim, self.config.rope_theta)
        x = embeddings
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.norm(x)


class LlamaForCausalLM(nnx.Module):
    """The language model with its output layer (unused by policies with a regression head)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.model = LlamaModel(config, rngs=rngs)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)


def bidirectional_mask(valid: Bool[Array, "b t"]) -> Bool[Array, "b 1 1 t"]:
    """Every position attends to every valid one (OpenVLA-OFT)."""
    return valid[:, None, None, :]


def causal_mask(valid: Bool[Array, "b t"]) -> Bool[Array, "b 1 t t"]:
    """Every position attends to valid ones up to itself (OpenVLA)."""
    t = valid.shape[1]
    lower = jnp.tril(jnp.ones((t, t), bool))
    return valid[:, None, None, :] & lower[None, None]
