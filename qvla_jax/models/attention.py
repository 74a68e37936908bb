"""Scaled dot-product attention."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float

# Finite, so that a row without any valid position gives numbers; far below every real logit.
_MASKED = -1e30


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s m d"],
    v: Float[Array, "b s m d"],
    mask: Bool[Array, "b 1 #t s"] | None = None,
) -> Float[Array, "b t n d"]:
    """softmax(q k^T / sqrt(d)) v for each head; softmax in float32.

    The same as `jax.nn.dot_product_attention`, which is three times slower on XLA's CPU backend:
    here heads are moved in front first, so that the products are batches of plain matrices.

    Args:
        q: queries, n heads.
        k: keys, m heads; n must be a multiple of m (grouped-query attention).
        v: values, m heads.
        mask: True where a query may attend to a key.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
    part = (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)
    return heads_first(q.swapaxes(1, 2), part).swapaxes(1, 2)


class DotProduct(nnx.Module):
    """Attention as a module, which packed policies replace (inference/fused_attention.py)."""

    def __init__(self, function: Callable[..., Array] = attention):
        """Takes `attention`, or another function that computes the same."""
        self.function = function

    def __call__(
        self,
        q: Float[Array, "b t n d"],
        k: Float[Array, "b s m d"],
        v: Float[Array, "b s m d"],
        mask: Bool[Array, "b 1 #t s"] | None = None,
    ) -> Float[Array, "b t n d"]:
        """See `attention`."""
        return self.function(q, k, v, mask)


def heads_first(
    q: Float[Array, "b n t d"],
    *parts: tuple[Float[Array, "b n d s"], Float[Array, "b n s d"], Bool[Array, "b 1 #t s"] | None],
) -> Float[Array, "b n t d"]:
    """`attention` with axes in the order in which the products read them, so that nothing is moved.

    Args:
        q: queries.
        parts: keys, values and mask of each part; a query attends to the positions of all parts.
    """
    q = q * q.shape[-1] ** -0.5
    logits = [_product(q, k).astype(jnp.float32) for k, _, _ in parts]
    masked = [
        x if mask is None else jnp.where(mask, x, _MASKED)
        for x, (_, _, mask) in zip(logits, parts, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(masked, axis=-1), axis=-1)
    ends = list(itertools.accumulate(k.shape[-1] for k, _, _ in parts))
    shares = jnp.split(weights, ends[:-1], axis=-1)
    outputs = (_product(w.astype(v.dtype), v) for w, (_, v, _) in zip(shares, parts, strict=True))
    return functools.reduce(jnp.add, outputs)


def _product(a: Float[Array, "b n t d"], b: Float[Array, "b n d s"]) -> Float[Array, "b n t s"]:
    # Products of bfloat16 numbers are exact. Where policies ask for float32 precision, the TPU
    # compiler's own kernel for attention would refuse them.
    exact = a.dtype == b.dtype == jnp.bfloat16
    return jnp.matmul(a, b, precision=jax.lax.Precision.DEFAULT if exact else None)
