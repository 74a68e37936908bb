"""Quantizer grids of one output channel (DESIGN.md section 3).

A row w in R^k at b bits has the symmetric grid

    qmax = 2^(b-1) - 1,   s = bf16(clip * max|w| / qmax),
    q = clip(round(w / s), -qmax - 1, qmax),   w_hat = s q,

with ties rounded to even. `clip = 1` is the grid of QVLA (arXiv 2602.03782). The scale is rounded
to bfloat16 first, because that is what is stored; the codes are those of the rounded scale. It
may round down by a factor of 1 - 2^-9 at most, so w / s exceeds qmax by at most 127 * 2^-9 < 1/2:
nothing is clipped that the exact scale would not clip, and |w - w_hat| <= s / 2 holds for
`clip = 1`.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float, Int, Int8
from qvla_jax.errors import InputError

PRUNED: Final = 0
SOURCE: Final = 16
# 3 bits exist for uniform baselines; no kernel packs them.
GRID_BITS: Final = (2, 3, 4, 8)
BITS: Final = (PRUNED, *GRID_BITS, SOURCE)

_SMALLEST_SCALE: Final = 2.0**-126
_LARGEST_SCALE: Final = float(jnp.finfo(jnp.bfloat16).max)


def _check_grid_bits(bits: int) -> None:
    if bits not in GRID_BITS:
        raise InputError(f"no grid has {bits} bits; choose from {GRID_BITS}")


def row_scales(weight: Float[Array, "c k"], bits: int, *, clip: float = 1.0) -> Float[Array, "c 1"]:
    """Scale of each row: float32 numbers that bfloat16 holds exactly.

    Args:
        weight: rows, any floating type.
        bits: 2, 3, 4 or 8.
        clip: share of the row's largest magnitude that the grid covers, in (0, 1].

    Returns:
        Positive, finite scales. A row of zeros, or one too small for a normal bfloat16 scale,
        gets the smallest normal number; a row of zeros then has zero codes.

    Raises:
        InputError: `bits` has no grid.
    """
    _check_grid_bits(bits)
    largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=1, keepdims=True)
    exact = largest * (clip / (2 ** (bits - 1) - 1))
    # A round trip through bfloat16 may be optimized away under jit; this may not.
    rounded = jax.lax.reduce_precision(exact, exponent_bits=8, mantissa_bits=7)
    return jnp.clip(rounded, _SMALLEST_SCALE, _LARGEST_SCALE)


def quantize_rows(
    weight: Float[Array, "c k"], bits: int, *, clip: float = 1.0
) -> tuple[Int8[Array, "c k"], Float[Array, "c 1"]]:
    """Codes and scales of all rows at one bit-width.

    Args:
        weight: rows, any floating type, finite.
        bits: 2, 3, 4 or 8.
        clip: as in `row_scales`.

    Returns:
        int8 codes in [-2^(b-1), 2^(b-1) - 1] and float32 scales that are bfloat16 numbers.

    Raises:
        InputError: `bits` has no grid.
    """
    scale = row_scales(weight, bits, clip=clip)
    qmax = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(weight.astype(jnp.float32) / scale), -qmax - 1, qmax)
    return codes.astype(jnp.int8), scale


def dequantize_rows(codes: Int8[Array, "c k"], scale: Float[Array, "c 1"]) -> Float[Array, "c k"]:
    """w_hat = s q in float32; exact, for a code has 8 significant bits and a scale as many."""
    return codes.astype(jnp.float32) * scale


def on_grid(weight: Float[Array, "c k"], bits: int, *, clip: float = 1.0) -> Float[Array, "c k"]:
    """w_hat in float32 of every row at one of `BITS`.

    0 gives zeros (the pruned row), 16 the weight itself. float32, because bfloat16 does not hold
    the product of a code and a scale.
    """
    if bits == SOURCE:
        return weight.astype(jnp.float32)
    if bits == PRUNED:
        return jnp.zeros(weight.shape, jnp.float32)
    return dequantize_rows(*quantize_rows(weight, bits, clip=clip))


@functools.partial(jax.jit, static_argnames="clip")
def on_mixed_grid(
    weight: Float[Array, "c k"], bits: Int[Array, " c"], *, clip: float = 1.0
) -> Float[Array, "c k"]:
    """w_hat in float32 where row c has `bits[c]` bits; 16-bit rows keep their values exactly."""
    result = weight.astype(jnp.float32)
    for option in (PRUNED, *GRID_BITS):
        result = jnp.where(bits[:, None] == option, on_grid(weight, option, clip=clip), result)
    return result
