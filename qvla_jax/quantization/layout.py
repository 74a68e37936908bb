"""Bytes that the packed layout of docs/mathematics.md section 6 stores, row by row.

A row of fan-in k at b bits is stored as

    4 ceil(k b / 32)   whole 32-bit words along k (16-bit rows: the source dtype, whole words), 2
    ceil(k / g)      its bfloat16 scales, for 2 to 8 bits (g = k unless scales are grouped), 2 (4)
    its bias, if the layer stores one, in the source dtype, 2                  its 16-bit entry in
    the layer's output index (mixed layouts alone).

A pruned row keeps only its bias, which holds its mean output: the index lists the rows that are
stored, and the outputs of all others are their biases. Biases count in every option, because each
layer with a corrected bias stores the whole vector. A uniform model needs no index; everything else
counts by the same rules.
"""

import math
from collections.abc import Sequence
from typing import Final

import ml_dtypes
import numpy as np

from qvla_jax.array_typing import Int
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import BITS, PRUNED, SOURCE
from qvla_jax.quantization.index import ChannelIndex

WORD_BYTES: Final = 4
SCALE_BYTES: Final = 2
INDEX_BYTES: Final = 2


def row_bytes(
    fan_in: int,
    bits: int,
    *,
    bias: bool,
    permuted: bool = True,
    source_bytes: int = 2,
    group: int | None = None,
) -> int:
    """Bytes of one row.

    Args:
        fan_in: inputs k of the row.
        bits: one of 0, 2, 3, 4, 8, 16.
        bias: the layer stores a bias.
        permuted: the layer stores an output index.
        source_bytes: bytes of one weight in the source dtype, which 16-bit rows and biases keep.
        group: inputs that share a scale; None: all of the row.

    Raises:
        InputError: `bits` is no option.
    """
    if bits not in BITS:
        raise InputError(f"no row has {bits} bits; choose from {BITS}")
    weight_bits = 8 * source_bytes if bits == SOURCE else bits
    words = math.ceil(fan_in * weight_bits / (8 * WORD_BYTES))
    scales = 1 if group is None else math.ceil(fan_in / group)
    scale = SCALE_BYTES * scales if bits not in (PRUNED, SOURCE) else 0
    entry = INDEX_BYTES if permuted and bits != PRUNED else 0
    return WORD_BYTES * words + scale + source_bytes * bias + entry


def option_sizes(
    index: ChannelIndex, bits: Sequence[int], *, bias_correction: bool = True
) -> Int[np.ndarray, "C n"]:
    """Bytes of every channel under every option of a mixed layout.

    Args:
        index: the channels.
        bits: options, n of them.
        bias_correction: every layer stores a bias, because it gets a corrected one.
    """
    rows = [
        [
            row_bytes(
                layer.fan_in,
                b,
                bias=layer.has_bias or bias_correction,
                source_bytes=layer.source_bytes,
            )
            for b in bits
        ]
        for layer in index.layers
    ]
    counts = [layer.out_features for layer in index.layers]
    return np.repeat(np.asarray(rows, np.int64), counts, axis=0)


def stored_bytes(
    index: ChannelIndex, bits: Int[np.ndarray, " C"], *, bias_correction: bool = True
) -> int:
    """Bytes of a mixed allocation, `bits[i]` for channel i."""
    options = sorted(set(np.asarray(bits).tolist()))
    sizes = option_sizes(index, options, bias_correction=bias_correction)
    return int(sizes[np.arange(len(sizes)), np.searchsorted(options, bits)].sum())


def uniform_bytes(index: ChannelIndex, bits: int) -> int:
    """Bytes of the uniform round-to-nearest model: no permutation, only the source's biases."""
    return sum(
        layer.out_features
        * row_bytes(
            layer.fan_in,
            bits,
            bias=layer.has_bias,
            permuted=False,
            source_bytes=layer.source_bytes,
        )
        for layer in index.layers
    )


def source_bytes(weight: np.ndarray) -> int:
    """Bytes of one weight in the narrowest floating type that holds a whole layer exactly.

    Weights that were rounded to bfloat16 cost two bytes even if they are held in float32.

    Args:
        weight: any shape, bfloat16, float16 or float32.
    """
    if weight.dtype.itemsize <= 2:
        return weight.dtype.itemsize
    rounded = weight.astype(ml_dtypes.bfloat16).astype(weight.dtype)
    return 2 if np.array_equal(rounded, weight) else weight.dtype.itemsize
