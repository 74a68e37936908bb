"""What quantization changes in a layer's rows: w_hat - w for every option."""

import functools

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.quantization.grid import Grid, on_grid


@functools.partial(jax.jit, static_argnames=("bits", "grid"))
def row_changes(
    weight: Float[Array, "c k"], bits: tuple[int, ...], *, grid: Grid = "fitted"
) -> Float[Array, "n c k"]:
    """w_hat - w in float32 of every row under every option; exactly 0 for 16 bits.

    Args:
        weight: source rows.
        bits: options.
        grid: "fitted" or "rtn".
    """
    source = weight.astype(jnp.float32)
    return jnp.stack([on_grid(weight, b, grid=grid) - source for b in bits])
