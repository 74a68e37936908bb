"""Randomized Hadamard rotation of a layer's inputs: x' = H (s x) / sqrt(n), n inputs at a time.

H is the Hadamard matrix of the largest power of two n that divides the inputs k, s are signs. The
rotation spreads each input over n of them, so that the range of a token, which determines how
finely it is rounded, no longer depends on its largest input (QuaRot, arXiv 2404.00456). Rows are
rotated in the same way, which changes no product. The signs depend only on k and are not stored:
bit i of SHAKE-128 of "qvla_jax rotation" says whether input i changes its sign.
"""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Array, Float


@functools.cache
def _signs(size: int) -> Float[np.ndarray, " k"]:
    stream = hashlib.shake_128(b"qvla_jax rotation").digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:size]
    return np.where(bits, np.float32(-1), np.float32(1))


@jax.jit
def _hadamard(x: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
    """Blocks of the last axis times H / sqrt(n), in float32 and log2 n steps."""
    size = x.shape[-1]
    block = math.gcd(size, 1 << size.bit_length())
    x = x.astype(jnp.float32)
    half = 1
    while half < block:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x * jnp.float32(block**-0.5)


def rotate(x: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
    """Rotates vectors along the last axis, in float32."""
    signs = jnp.asarray(_signs(x.shape[-1])).reshape((1,) * (x.ndim - 1) + (-1,))
    return _hadamard(x.astype(jnp.float32) * signs)


def rotate_back(x: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
    """The inverse of `rotate`, its transpose."""
    signs = jnp.asarray(_signs(x.shape[-1])).reshape((1,) * (x.ndim - 1) + (-1,))
    return _hadamard(x) * signs
