"""Llama decoder, as in Hugging Face's `LlamaForCausalLM`.

The mask is an argument: OpenVLA runs it causally, OpenVLA-OFT lets every position attend to every
position that is not padding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float, Int
from qvla_jax.families.prismatic.config import LlamaConfig
from qvla_jax.models.attention import DotProduct, heads_first
from qvla_jax.models.linear import Embed, Linear


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, for the prompt's t positions and r later tokens.

    Axes are in the order in which `heads_first` reads them, and existing entries are never written
    again: XLA's CPU backend would copy the whole cache for every token, which takes as long as the
    products with all weights.
    """

    k: Float[Array, "b m d t"]
    v: Float[Array, "b m t d"]
    later_k: Float[Array, "b m d r"]
    later_v: Float[Array, "b m r d"]


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
        self.attention = DotProduct()

    def __call__(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
        mask: Bool[Array, "b 1 #t s"],
    ) -> Float[Array, "b t c"]:
        q, k, v = self._project(x, angles)
        return self.o_proj(self.attention(q, k, v, mask).reshape(x.shape))

    def fill(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
        mask: Bool[Array, "b 1 #t t"],
    ) -> tuple[Float[Array, "b t c"], KVCache]:
        """Like a call, but also returns the cache of these positions."""
        q, k, v = self._project(x, angles)
        held_k, held_v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        cache = KVCache(k=held_k, v=held_v, later_k=held_k[..., :0], later_v=held_v[:, :, :0])
        return self.o_proj(self.attention(q, k, v, mask).reshape(x.shape)), cache

    def step(
        self,
        x: Float[Array, "b 1 c"],
        angles: tuple[Float[Array, "b 1 1 r"], Float[Array, "b 1 1 r"]],
        places: Int[Array, " b"],
        cache: KVCache,
    ) -> tuple[Float[Array, "b 1 c"], KVCache]:
        """One token of each sequence at its position; attends to all positions up to it.

        Later tokens take the prompt's padded positions.
        """
        q, k, v = self._project(x, angles)
        cache = dataclasses.replace(
            cache,
            later_k=jnp.concatenate([cache.later_k, k.transpose(0, 2, 3, 1)], axis=3),
            later_v=jnp.concatenate([cache.later_v, v.swapaxes(1, 2)], axis=2),
        )
        b, m, d, t = cache.k.shape
        prompt = jnp.arange(t)[None] <= places[:, None] - cache.later_k.shape[3]
        y = heads_first(
            q.reshape(b, m, -1, d),  # the queries of a key-value head are rows of one product
            (cache.k, cache.v, prompt[:, None, None]),
            (cache.later_k, cache.later_v, None),
        )
        return self.o_proj(y.reshape(x.shape)), cache

    def _project(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
    ) -> tuple[Float[Array, "b t n d"], Float[Array, "b t m d"], Float[Array, "b t m d"]]:
        b, t, c = x.shape
        head_dim = c // self.config.num_attention_heads
        q, k, v = (
            proj(x).reshape(b, t, -1, head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rotary(q, angles), apply_rotary(k, angles), v


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
        return self._transform(x + self.self_attn(self.input_layernorm(x), angles, mask))

    def fill(
        self,
        x: Float[Array, "b t c"],
        angles: tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]],
        mask: Bool[Array, "b 1 #t t"],
    ) -> tuple[Float[Array, "b t c"], KVCache]:
        """See `LlamaAttention.fill`."""
        y, cache = self.self_attn.fill(self.input_layernorm(x), angles, mask)
        return self._transform(x + y), cache

    def step(
        self,
        x: Float[Array, "b 1 c"],
        angles: tuple[Float[Array, "b 1 1 r"], Float[Array, "b 1 1 r"]],
        places: Int[Array, " b"],
        cache: KVCache,
    ) -> tuple[Float[Array, "b 1 c"], KVCache]:
        """See `LlamaAttention.step`."""
        y, cache = self.self_attn.step(self.input_layernorm(x), angles, places, cache)
        return self._transform(x + y), cache

    def _transform(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nnx.Module):
    """Token embeddings, decoder layers and the final norm."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embed(
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
        angles = self._angles(_positions(embeddings))
        x = embeddings
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.norm(x)

    def fill(
        self, embeddings: Float[Array, "b t c"], mask: Bool[Array, "b 1 #t t"]
    ) -> tuple[Float[Array, "b t c"], list[KVCache]]:
        """Like a call, but also returns the cache of each layer."""
        angles = self._angles(_positions(embeddings))
        x, caches = embeddings, []
        for layer in self.layers:
            x, cache = layer.fill(x, angles, mask)
            caches.append(cache)
        return self.norm(x), caches

    def step(
        self, embedding: Float[Array, "b 1 c"], places: Int[Array, " b"], caches: list[KVCache]
    ) -> tuple[Float[Array, "b 1 c"], list[KVCache]]:
        """One more token of each sequence: its final-norm state, and the updated caches."""
        angles = self._angles(places[:, None])
        x, updated = embedding, []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, angles, places, cache)
            updated.append(cache)
        return self.norm(x), updated

    def _angles(
        self, positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]]:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return rotary_angles(positions, head_dim, self.config.rope_theta)


def _positions(embeddings: Float[Array, "b t c"]) -> Int[Array, "b t"]:
    return jnp.broadcast_to(jnp.arange(embeddings.shape[1])[None], embeddings.shape[:2])


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
