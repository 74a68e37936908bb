"""Gemma with two experts that attend together, as pi0 and pi0.5 have it.

Expert 0 (PaliGemma's) takes images and prompt, the prefix; expert 1 takes the action tokens, the
suffix. Each has its own weights, under the same names with `_1` behind those of expert 1. The
prefix runs once and stores its keys and values; a suffix attends to these and to its own.

Module paths are the public names (`openpi.names`); layers are unrolled, and of stacked weights
(keys and values, gate and up) each has a layer of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float, Int
from qvla_jax.families.openpi.config import GemmaConfig
from qvla_jax.models.attention import DotProduct, heads_first
from qvla_jax.models.linear import Embed, Linear

_EXPERTS: Final = ("", "_1")
_MAX_WAVELENGTH: Final = 10_000.0

# Cosines and sines of every position, for the half-split rotary embedding.
Angles = tuple[Float[Array, "b t 1 r"], Float[Array, "b t 1 r"]]
# Scale, shift and gate of one adaptive norm, side by side, for each step or sample.
Modulation = Float[Array, "#b n 3*c"]


def rotary_angles(positions: Int[Array, "b t"], head_dim: int) -> Angles:
    """Cosines and sines in float32; r = head_dim / 2."""
    exponent = (2.0 / head_dim) * jnp.arange(head_dim // 2, dtype=jnp.float32)
    wavelength = _MAX_WAVELENGTH**exponent
    radians = positions[:, :, None].astype(jnp.float32) / wavelength[None, None]
    return jnp.cos(radians)[:, :, None], jnp.sin(radians)[:, :, None]


def apply_rotary(x: Float[Array, "b t n d"], angles: Angles) -> Float[Array, "b t n d"]:
    """Rotates the two halves of each head against each other, in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys (rotated) and values of one layer; axes lie as `heads_first` reads them."""

    k: Float[Array, "b m d t"]
    v: Float[Array, "b m t d"]

    @classmethod
    def of(cls, k: Float[Array, "b t m d"], v: Float[Array, "b t m d"]) -> "KeysValues":
        """From axes in the order in which layers compute them."""
        return cls(k=k.transpose(0, 2, 3, 1), v=v.swapaxes(1, 2))


class RMSNorm(nnx.Module):
    """x / rms(x) (1 + scale), the mean square in float32."""

    def __init__(self, dim: int):
        self.epsilon = 1e-6
        self.scale = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        factor = 1 + self.scale[...].astype(x.dtype)
        y = normalized(x, self.epsilon) * factor.astype(jnp.float32)[None, None]
        return y.astype(x.dtype)


class AdaRMSNorm(nnx.Module):
    """x / rms(x) (1 + scale) + shift; scale, shift and a gate are linear in the conditioning."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.epsilon = 1e-6
        self.Dense_0 = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)

    def modulation(self, condition: Float[Array, "#b n c"]) -> Modulation:
        """Scale, shift and gate for each conditioning vector."""
        return self.Dense_0(condition)

    def __call__(
        self, x: Float[Array, "b t c"], modulation: Float[Array, "#b 1 3*c"]
    ) -> tuple[Float[Array, "b t c"], Float[Array, "#b 1 c"]]:
        """The modulated tokens, and the gate of the residual branch that they enter."""
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        factor, shift = (1 + scale).astype(jnp.float32), shift.astype(jnp.float32)
        y = normalized(x, self.epsilon) * factor + shift
        return y.astype(x.dtype), gate


def normalized(x: Float[Array, "b t c"], epsilon: float) -> Float[Array, "b t c"]:
    """Divides by the root of the mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon))


class Attention(nnx.Module):
    """Projections of both experts, and the attention that they share."""

    def __init__(self, configs: Sequence[GemmaConfig], *, dtype: Any, rngs: nnx.Rngs):
        self.head_dim = configs[0].head_dim
        heads = configs[0].num_heads * configs[0].head_dim
        kv_heads = configs[0].num_kv_heads * configs[0].head_dim
        for suffix, config in zip(_EXPERTS, configs, strict=True):
            for name, fan_in, out in (
                ("q_einsum", config.width, heads),
                ("k_einsum", config.width, kv_heads),
                ("v_einsum", config.width, kv_heads),
                ("attn_vec_einsum", heads, config.width),
            ):
                layer = Linear(fan_in, out, use_bias=False, dtype=dtype, rngs=rngs)
                setattr(self, name + suffix, layer)
        self.attention = DotProduct(_attention)

    def queries(
        self, x: Float[Array, "b t c"], angles: Angles, expert: int
    ) -> Float[Array, "b t n d"]:
        """Rotated queries."""
        return apply_rotary(self._heads("q_einsum", x, expert), angles)

    def keys_values(self, x: Float[Array, "b t c"], angles: Angles, expert: int) -> KeysValues:
        """Rotated keys, and values."""
        return KeysValues.of(*self._keys_values(x, angles, expert))

    def fill(
        self, x: Float[Array, "b s c"], angles: Angles, mask: Bool[Array, "b 1 #s s"]
    ) -> tuple[Float[Array, "b s c"], KeysValues]:
        """The prefix's attention to itself, and its keys and values."""
        k, v = self._keys_values(x, angles, 0)
        y = self.attention(self.queries(x, angles, 0), k, v, mask)
        return self.output(y.reshape(*x.shape[:2], -1), 0), KeysValues.of(k, v)

    def output(self, y: Float[Array, "b t n*d"], expert: int) -> Float[Array, "b t c"]:
        """The attention's output, in the expert's width."""
        return getattr(self, "attn_vec_einsum" + _EXPERTS[expert])(y)

    def _keys_values(
        self, x: Float[Array, "b t c"], angles: Angles, expert: int
    ) -> tuple[Float[Array, "b t m d"], Float[Array, "b t m d"]]:
        k = apply_rotary(self._heads("k_einsum", x, expert), angles)
        return k, self._heads("v_einsum", x, expert)

    def _heads(self, name: str, x: Float[Array, "b t c"], expert: int) -> Float[Array, "b t n d"]:
        y = getattr(self, name + _EXPERTS[expert])(x)
        return y.reshape(*y.shape[:2], -1, self.head_dim)


def attend(
    q: Float[Array, "b t n d"],
    *parts: tuple[KeysValues, Bool[Array, "#b 1 #t s"] | None],
) -> Float[Array, "b t n*d"]:
    """Attention to the places of all parts; queries of a key-value head are rows of one product.

    Args:
        q: queries.
        parts: keys and values, and a mask that is True where a query may attend; None: everywhere.
    """
    b, t, n, d = q.shape
    m = parts[0][0].k.shape[1]
    rows = q.reshape(b, t, m, n // m, d).swapaxes(1, 2).reshape(b, m, -1, d)
    y = heads_first(
        rows.astype(jnp.float32),  # logits are accumulated in float32 whatever the dtype
        *(
            (
                part.k.astype(jnp.float32),
                part.v,
                mask if mask is None or mask.shape[2] == 1 else jnp.repeat(mask, n // m, axis=2),
            )
            for part, mask in parts
        ),
    )
    return y.reshape(b, m, t, -1, d).swapaxes(1, 2).reshape(b, t, n * d)


def _attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s m d"],
    v: Float[Array, "b s m d"],
    mask: Bool[Array, "b 1 #t s"],
) -> Float[Array, "b t n d"]:
    return attend(q, (KeysValues.of(k, v), mask)).reshape(q.shape)


class FeedForward(nnx.Module):
    """Gated by a tanh GELU."""

    def __init__(self, config: GemmaConfig, *, dtype: Any, rngs: nnx.Rngs):
        width, hidden = config.width, config.mlp_dim
        self.gate = Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.linear = Linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.linear(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """Pre-norm decoder layer of both experts."""

    def __init__(
        self, configs: Sequence[GemmaConfig], *, adaptive: bool, dtype: Any, rngs: nnx.Rngs
    ):
        first, second = configs

        def norm() -> RMSNorm | AdaRMSNorm:
            if adaptive:
                return AdaRMSNorm(second.width, dtype=dtype, rngs=rngs)
            return RMSNorm(second.width)

        self.pre_attention_norm = RMSNorm(first.width)
        self.pre_attention_norm_1 = norm()
        self.attn = Attention(configs, dtype=dtype, rngs=rngs)
        self.pre_ffw_norm = RMSNorm(first.width)
        self.pre_ffw_norm_1 = norm()
        self.mlp = FeedForward(first, dtype=dtype, rngs=rngs)
        self.mlp_1 = FeedForward(second, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        angles: Angles,
        mask: Bool[Array, "#b 1 #t t"] | None = None,
        prefix: KeysValues | None = None,
        valid: Bool[Array, "b 1 1 s"] | None = None,
        modulations: tuple[Modulation, Modulation] | None = None,
    ) -> Any:
        """One of the three ways through the layer, as one call that others can wrap.

        With keys and values of a prefix it is `step`; without, `fill`; and without a mask, either,
        `keys_values`.
        """
        if prefix is not None and valid is not None:
            return self.step(x, angles, prefix, valid, mask, modulations)
        return self.keys_values(x, angles) if mask is None else self.fill(x, angles, mask)

    def fill(
        self, x: Float[Array, "b s c"], angles: Angles, mask: Bool[Array, "b 1 #s s"]
    ) -> tuple[Float[Array, "b s c"], KeysValues]:
        """The prefix after this layer, and its keys and values in it."""
        y, held = self.attn.fill(self.pre_attention_norm(x), angles, mask)
        x = x + y
        return x + self.mlp(self.pre_ffw_norm(x)), held

    def keys_values(self, x: Float[Array, "b s c"], angles: Angles) -> KeysValues:
        """The prefix's keys and values alone: all that is read of the last layer."""
        return self.attn.keys_values(self.pre_attention_norm(x), angles, 0)

    def step(
        self,
        x: Float[Array, "b t c"],
        angles: Angles,
        prefix: KeysValues,
        valid: Bool[Array, "b 1 1 s"],
        mask: Bool[Array, "1 1 t t"] | None,
        modulations: tuple[Modulation, Modulation] | None,
    ) -> Float[Array, "b t c"]:
        """The suffix after this layer.

        Args:
            x: the suffix.
            angles: of its positions.
            prefix: keys and values of the prefix in this layer.
            valid: places of the prefix that are not padding.
            mask: which places of the suffix attend to which; None: all to all.
            modulations: of both adaptive norms, for one step.
        """
        before, after = modulations or (None, None)
        y, gate = _norm(self.pre_attention_norm_1, x, before)
        q = self.attn.queries(y, angles, 1)
        own = self.attn.keys_values(y, angles, 1)
        y = self.attn.output(attend(q, (prefix, valid), (own, mask)), 1)
        x = _residual(x, y, gate)
        y, gate = _norm(self.pre_ffw_norm_1, x, after)
        return _residual(x, self.mlp_1(y), gate)


def _norm(
    norm: Any, x: Float[Array, "b t c"], modulation: Modulation | None
) -> tuple[Float[Array, "b t c"], Float[Array, "#b 1 c"] | None]:
    """The norm's output and, if it is adaptive, its gate."""
    return (norm(x), None) if modulation is None else norm(x, modulation)


def _residual(
    x: Float[Array, "b t c"], y: Float[Array, "b t c"], gate: Float[Array, "#b 1 c"] | None
) -> Float[Array, "b t c"]:
    return x + (y if gate is None else y * gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modulations:
    """Of all adaptive norms, for n steps; they depend on nothing but time."""

    layers: list[tuple[Modulation, Modulation]]
    final: Modulation

    @classmethod
    def of_norms(cls, norms: Float[Array, "norms 1 n 3*c"]) -> "Modulations":
        """From those of all norms, in order."""
        *layers, final = norms
        return cls(layers=list(zip(layers[::2], layers[1::2], strict=True)), final=final)


class Gemma(nnx.Module):
    """Embeddings, layers and final norms of both experts."""

    def __init__(
        self,
        configs: Sequence[GemmaConfig],
        vocab_size: int,
        *,
        adaptive: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        first, second = configs
        self.head_dim = first.head_dim
        self.width = first.width
        self.dtype = dtype
        self.embedder = Embed(vocab_size, first.width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Block(configs, adaptive=adaptive, dtype=dtype, rngs=rngs) for _ in range(first.depth)]
        )
        # Of the prefix: stored, never read by a policy.
        self.final_norm = RMSNorm(first.width)
        self.final_norm_1 = (
            AdaRMSNorm(second.width, dtype=dtype, rngs=rngs) if adaptive else RMSNorm(second.width)
        )

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        """Rows of the tokens times the square root of the width."""
        rows = self.embedder(tokens)
        return rows * jnp.sqrt(jnp.float32(self.width)).astype(rows.dtype)

    def modulations(self, condition: Float[Array, "#b n c"]) -> Modulations:
        """What the adaptive norms make of each conditioning vector."""
        layers: list[Any] = list(self.layers)  # whose norms are adaptive, or nobody asks
        final: Any = self.final_norm_1
        return Modulations(
            layers=[
                (
                    layer.pre_attention_norm_1.modulation(condition),
                    layer.pre_ffw_norm_1.modulation(condition),
                )
                for layer in layers
            ],
            final=final.modulation(condition),
        )

    def fill(
        self,
        x: Float[Array, "b s c"],
        positions: Int[Array, "b s"],
        mask: Bool[Array, "b 1 #s s"],
    ) -> list[KeysValues]:
        """Keys and values of the prefix in every layer.

        Nothing reads what the last layer makes of the prefix: its queries, output and MLP are not
        computed.
        """
        angles = rotary_angles(positions, self.head_dim)
        x = x.astype(self.dtype)
        *layers, last = self.layers
        held = []
        for layer in layers:
            x, kept = layer(x, angles, mask)
            held.append(kept)
        return [*held, last(x, angles)]

    def step(
        self,
        x: Float[Array, "b t c"],
        positions: Int[Array, "b t"],
        prefix: list[KeysValues],
        valid: Bool[Array, "b 1 1 s"],
        mask: Bool[Array, "1 1 t t"] | None,
        modulations: Modulations | None,
    ) -> Float[Array, "b t c"]:
        """Suffix tokens -> their final-norm states; see `Block.step`."""
        angles = rotary_angles(positions, self.head_dim)
        x = x.astype(self.dtype)
        of_layers = [None] * len(prefix) if modulations is None else modulations.layers
        for layer, held, own in zip(self.layers, prefix, of_layers, strict=True):
            x = layer(x, angles, mask, held, valid, own)
        final = None if modulations is None else modulations.final
        return _norm(self.final_norm_1, x, final)[0]
