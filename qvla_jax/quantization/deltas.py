"""What quantization changes in a layer's rows: w_hat - w for every option."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.quantization.grid import on_grid


@functools.partial(jax.jit, static_argnames="bits")
def row_changes(weight: Float[Array, "c k"], bits: Sequence[int]) -> Float[Array, "n c k"]:
    """w_hat - w in float32 of every row under every option; exactly 0 for 16 bits.

    Args:
        weight: source rows.
        bits: options, a tuple.
    """
    source = weight.astype(jnp.float32)
    return jnp.stack([on_grid(weight, b) - source for b in bits])
