"""The reference implementation in plain `jax.numpy`: it defines what `mixed_matmul` means.

    y[..., c] = sum_i x_hat[..., i] w_hat[c, i] + bias[c],

with w_hat as in `PackedWeight`, accumulated in float32. x_hat is x at 16 activation bits; at 8 and
4 bits it is x rounded by `quantize_activations`, except for 16-bit rows, which meet x as it is.
"""

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels.activations import round_activations
from qvla_jax.kernels.packed import PackedWeight, segment_rows, segment_values
from qvla_jax.quantization.grid import SOURCE


def prepare(w: PackedWeight) -> PackedWeight:
    """The canonical order is the one that the reference computes from."""
    return w


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    del w
    return None


def matmul(x: Float[Array, "*m k"], w: PackedWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """See the module."""
    exact = x.astype(jnp.float32)
    rounded = round_activations(x, activation_bits)
    y = jnp.zeros((*x.shape[:-1], w.shape[0]), jnp.float32)
    for number, segment in enumerate(w.segments):
        left = exact if segment.bits == SOURCE else rounded
        part = _dot(left, jnp.asarray(segment_values(w, number)).T)
        y = y.at[..., segment_rows(w, number)].set(part)
    if w.bias is not None:
        y = y + jnp.asarray(w.bias).astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def transposed(dy: Float[Array, "*m c"], w: PackedWeight) -> Float[Array, "*m k"]:
    """Dy w_hat, segment by segment: the gradient with respect to the activations."""
    dy32 = dy.astype(jnp.float32)
    dx = jnp.zeros((*dy.shape[:-1], w.shape[1]), jnp.float32)
    for number in range(len(w.segments)):
        rows = segment_rows(w, number)
        dx = dx + _dot(dy32[..., rows], jnp.asarray(segment_values(w, number)))
    return dx.astype(dy.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
