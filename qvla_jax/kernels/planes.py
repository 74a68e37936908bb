"""Unpacks a plane of a block and multiplies by it, for the Triton kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Array, Float, Int32
from qvla_jax.kernels.codes import WORD_BITS
from qvla_jax.quantization.codes import SOURCE, CodeMap


def unpack(
    words: Int32[Array, "depth n"], bits: int, plane: int, codes: CodeMap
) -> Int32[Array, "depth n"] | Float[Array, "depth n"]:
    """Codes q of a plane; at 16 bits the bfloat16 numbers, widened to float32.

    Args:
        words: the words of a block.
        bits: the width of its tile.
        plane: the bit field, 0 to 32 / bits - 1.
        codes: the integers that stored codes of this tile stand for.
    """
    if bits == SOURCE:  # the upper halves of float32
        upper = words << 16 if plane == 0 else words & np.int32(-(2**16))
        return jax.lax.bitcast_convert_type(upper, jnp.float32)
    field = words
    if plane < WORD_BITS // bits - 1:
        field = field << (WORD_BITS - bits * (plane + 1))
    field = field >> (WORD_BITS - bits)  # an arithmetic shift keeps the sign
    shift = codes.offset + codes.multiplier * 2 ** (bits - 1)  # of s = u - 2^(b-1)
    return field if (codes.multiplier, shift) == (1, 0) else codes.multiplier * field + shift


def dot(x: Float[Array, "m depth"], plane: Array) -> Array:
    """`x` times a plane, which the type of x holds exactly; sums in int32 or float32."""
    if x.dtype == jnp.int8:
        return jnp.dot(x, plane.astype(jnp.int8), preferred_element_type=jnp.int32)
    plane = plane.astype(jnp.float32)
    if x.dtype == jnp.float32:
        return jnp.dot(x, plane, precision=jax.lax.Precision.HIGHEST)
    return jnp.dot(x, plane.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
