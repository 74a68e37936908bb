"""Products for programs that leave this package: operations of StableHLO on the canonical weight.

The reference computes the same, but its program holds an array of positions as large as the
unpacked weight, and compilers may unpack all layers of a network before they use the first. Here
rows are unpacked by shifts, block by block in a loop that multiplies them, too: it cannot start
before its inputs are there, so that no more than a block is unpacked at a time.
"""

import dataclasses
from typing import Final

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels.activations import round_activations
from qvla_jax.kernels.packed import PackedWeight, segment_values
from qvla_jax.kernels.reference import CanonicalWeight, assembled
from qvla_jax.kernels.reference import canonical as canonical
from qvla_jax.quantization.codes import SOURCE

# Rows that are unpacked at a time.
_ROWS: Final = 256


def prepare(w: PackedWeight) -> CanonicalWeight:
    """The blocks are cut from the canonical order."""
    return CanonicalWeight(w, "portable")


def matmul(
    x: Float[Array, "*m k"], prepared: CanonicalWeight, activation_bits: int
) -> Float[Array, "*m c"]:
    """See `kernels.reference`."""
    w = prepared.weight
    flat = x.reshape(-1, x.shape[-1])
    rounded = round_activations(flat, activation_bits)
    narrow = rounded if activation_bits == 16 else flat.astype(jnp.bfloat16).astype(jnp.float32)
    parts = [
        _product(narrow if segment.bits == SOURCE else rounded, w, number)
        for number, segment in enumerate(w.segments)
    ]
    return assembled([part.reshape(*x.shape[:-1], -1) for part in parts], x, w)


def _product(x: Float[Array, "m k"], w: PackedWeight, number: int) -> Float[Array, "m r"]:
    """Products with the rows of one segment."""
    segment, words, scales = w.segments[number], w.words[number], w.scales[number]
    # At least two turns, because compilers unroll a loop of one.
    block = min(_ROWS, -(-segment.rows // 2))

    def turn(step: Array, y: Float[Array, "m r"]) -> Float[Array, "m r"]:
        # The last block overlaps the one before.
        start = jnp.minimum(step * block, segment.rows - block)
        part = dataclasses.replace(
            w,
            words=(jax.lax.dynamic_slice_in_dim(jnp.asarray(words), start, block),),
            scales=(jax.lax.dynamic_slice_in_dim(jnp.asarray(scales), start, block),),
            segments=(dataclasses.replace(segment, rows=block),),
        )
        values = jnp.asarray(segment_values(part, 0))
        own = jnp.matmul(x, values.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(y, own, start, axis=1)

    turns = -(-segment.rows // block)
    return jax.lax.fori_loop(0, turns, turn, jnp.zeros((len(x), segment.rows), jnp.float32))
