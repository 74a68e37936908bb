"""Tables whose rows are looked up, such as token embeddings: one width, a scale for each row."""

import dataclasses
from typing import Final

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.kernels.codes import num_words
from qvla_jax.kernels.packed import PackedWeight, Segment, segment_values
from qvla_jax.kernels.packing import pack
from qvla_jax.quantization.codes import SOURCE, Grid, code_map

# Rows rounded at once, which bounds the memory and serves tables of all lengths with one program.
_ROWS: Final = 1024


def pack_table(table: Float[AnyArray, "v c"], bits: int, *, grid: Grid = "rtn") -> PackedWeight:
    """Rounds the rows of a table to nearest and packs them, in order.

    Args:
        table: finite; it may be mapped from a file, and is read block by block.
        bits: of every row: 2, 3, 4 or 8.
        grid: the quantizer's grid. At 8 bits "rtn" divides a row's largest magnitude by 127.

    Raises:
        InputError: no grid has these bits, or the table holds NaN or inf.
    """
    segment = Segment(bits, len(table), code_map(bits, grid))
    words = np.empty((len(table), num_words(table.shape[1], bits)), np.uint32)
    scales = np.empty((len(table), 1), ml_dtypes.bfloat16)
    for start in range(0, len(table), _ROWS):
        block = np.asarray(table[start : start + _ROWS])
        filled = np.pad(block, ((0, _ROWS - len(block)), (0, 0)))
        part = pack(filled, np.full(_ROWS, bits), grid=grid, index=False)
        words[start : start + len(block)] = part.words[0][: len(block)]
        scales[start : start + len(block)] = part.scales[0][: len(block)]
    return PackedWeight(
        words=(words,),
        scales=(scales,),
        index=None,
        bias=None,
        segments=(segment,),
        shape=(table.shape[0], table.shape[1]),
    )


def check_table(w: PackedWeight) -> None:
    """Raises an `InputError` unless the rows have one width below 16 bits, in order, unbiased."""
    widths = [segment.bits for segment in w.segments]
    if len(widths) != 1 or widths[0] == SOURCE or w.index is not None or w.bias is not None:
        raise InputError(
            f"a table of {w.shape[0]} rows of {widths} bits"
            f"{'' if w.index is None else ' with an index'}"
            f"{'' if w.bias is None else ' with a bias'}: lookups take rows of one width below 16 "
            "bits"
        )


def table_rows(w: PackedWeight, ids: Int[Array, " n"]) -> Float[Array, "n c"]:
    """Codes times scale of some rows, in float32; only these are unpacked.

    Args:
        w: a table; see `check_table`.
        ids: rows.
    """
    found = dataclasses.replace(
        w,
        words=(w.words[0][ids],),
        scales=(w.scales[0][ids],),
        segments=(dataclasses.replace(w.segments[0], rows=len(ids)),),
        shape=(len(ids), w.shape[1]),
    )
    return jnp.asarray(segment_values(found, 0))
