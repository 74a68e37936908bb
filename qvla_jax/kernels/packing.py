"""Packs rows, each with its own bit-width, into a `PackedWeight`."""

import jax
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import AnyArray, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.kernels.codes import pack_words, to_unsigned
from qvla_jax.kernels.packed import (
    GROUP_MULTIPLE,
    SOURCE_DTYPES,
    WIDTHS,
    PackedWeight,
    Segment,
    source_words,
    validate,
)
from qvla_jax.quantization.codes import BITS, GRID_BITS, PRUNED, SOURCE, Grid, code_map
from qvla_jax.quantization.grid import quantize_rows
from qvla_jax.quantization.index import MAX_CHANNELS
from qvla_jax.quantization.layout import source_bytes
from qvla_jax.quantization.rows import QuantizedRows


def pack(
    weight: Float[AnyArray, "c k"],
    bits: Int[AnyArray, " c"],
    group: int | None = None,
    *,
    grid: Grid = "fitted",
    bias: Float[AnyArray, " c"] | None = None,
    source_dtype: str | None = None,
    index: bool = True,
) -> PackedWeight:
    """Rounds the rows of a weight matrix to nearest and packs them.

    Args:
        weight: source rows, float32 or narrower, finite.
        bits: 0, 2, 3, 4, 8 or 16 for each row.
        group: inputs that share a scale, a multiple of 16; None: one scale for each row.
        grid: the quantizer's grid: "fitted" or "rtn".
        bias: see `pack_rows`.
        source_dtype: see there.
        index: see there.

    Raises:
        InputError: as `pack_rows`.
    """
    source = np.asarray(weight)
    widths = _check(source, np.asarray(bits), group, index)
    rows = nearest_rows(source, widths, group, grid)
    return pack_rows(rows, source, bias=bias, source_dtype=source_dtype, index=index)


def pack_rows(
    rows: QuantizedRows,
    source: Float[AnyArray, "c k"],
    *,
    bias: Float[AnyArray, " c"] | None = None,
    source_dtype: str | None = None,
    index: bool = True,
) -> PackedWeight:
    """Packs quantized rows.

    The stored bytes are those that `quantization.layout.row_bytes` counts for each row.

    Args:
        rows: codes and scales. Its `input_scale` belongs to the layer, not the weight.
        source: the rows that were quantized, float32 or narrower, finite: 16-bit rows keep them.
        bias: the layer's bias, kept in its dtype; outputs of pruned rows are their bias.
        source_dtype: dtype of 16-bit rows; None: the narrowest that holds the whole weight exactly.
        index: whether to store the channel of each row. False requires one width for all rows.

    Raises:
        InputError: shapes do not fit, a width is no option, a weight, code or scale cannot be
            stored, or the layer has more than 65536 channels.
    """
    source = np.asarray(source)
    widths = _check(source, np.asarray(rows.bits), rows.group, index)
    all_codes, all_scales = np.asarray(rows.codes), np.asarray(rows.scales)
    _check_rows(all_codes, all_scales, source.shape, rows.group)
    if source_dtype is None:
        source_dtype = _narrowest(source)
    segments, words, scales, order = [], [], [], []
    for width in WIDTHS:
        chosen = np.flatnonzero(widths == width)
        if not chosen.size:
            continue
        order.append(chosen)
        if width == SOURCE:
            segments.append(Segment(width, chosen.size))
            words.append(_exact_source(source[chosen], source_dtype))
            scales.append(np.zeros((chosen.size, 0), ml_dtypes.bfloat16))
            continue
        meaning = code_map(width, rows.grid)
        segments.append(Segment(width, chosen.size, meaning))
        words.append(pack_words(to_unsigned(all_codes[chosen], width, meaning), width))
        scales.append(_exact_scales(all_scales[chosen]))
    packed = PackedWeight(
        words=tuple(words),
        scales=tuple(scales),
        index=np.concatenate([np.zeros(0, np.int64), *order]).astype(np.uint16) if index else None,
        bias=None if bias is None else np.asarray(bias),
        segments=tuple(segments),
        shape=(source.shape[0], source.shape[1]),
        group=rows.group,
        source_dtype=source_dtype,
    )
    validate(packed)
    return packed


def nearest_rows(
    source: Float[np.ndarray, "c k"],
    bits: Int[np.ndarray, " c"],
    group: int | None = None,
    grid: Grid = "fitted",
) -> QuantizedRows:
    """Rows rounded to nearest, each at its own bit-width.

    Args:
        source: the rows.
        bits: 0, 2, 3, 4, 8 or 16 for each row.
        group: inputs that share a scale; None: one scale for each row.
        grid: the quantizer's grid.
    """
    groups = 1 if group is None else -(-source.shape[1] // group)
    codes = np.zeros(source.shape, np.int8)
    scales = np.ones((len(source), groups), np.float32)
    for width in GRID_BITS:
        chosen = np.flatnonzero(bits == width)
        if chosen.size:
            own_codes, own_scales = _round(source, width, group, grid)
            codes[chosen], scales[chosen] = own_codes[chosen], own_scales[chosen]
    return QuantizedRows(bits=bits, codes=codes, scales=scales, grid=grid, group=group)


def _check(rows: np.ndarray, widths: np.ndarray, group: int | None, index: bool) -> np.ndarray:
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"weight: expected rows [c, k], got shape {rows.shape}")
    if widths.shape != rows.shape[:1] or not np.issubdtype(widths.dtype, np.integer):
        raise InputError(
            f"bits: expected {rows.shape[0]} integers, one for each row of the weight, got "
            f"{widths.dtype}{list(widths.shape)}"
        )
    bad = np.flatnonzero(~np.isin(widths, BITS))
    if bad.size:
        raise InputError(f"bits: row {bad[0]} has {widths[bad[0]]}, which is none of {BITS}")
    if rows.shape[0] > MAX_CHANNELS:
        raise InputError(
            f"weight: {rows.shape[0]} output channels; the 16-bit index serves {MAX_CHANNELS}"
        )
    if group is not None and (group < 1 or group % GROUP_MULTIPLE):
        raise InputError(f"group: expected a multiple of {GROUP_MULTIPLE}, got {group}")
    if not index and (len(np.unique(widths)) > 1 or (widths == PRUNED).any()):
        raise InputError("index=False needs one bit-width for all rows, and none of them pruned")
    finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
    if not finite.all():
        raise InputError(f"weight: row {np.flatnonzero(~finite)[0]} holds NaN or inf")
    return widths


def _narrowest(rows: np.ndarray) -> str:
    if rows.dtype.itemsize <= 2:
        return rows.dtype.name
    return "bfloat16" if source_bytes(rows) == 2 else "float32"


def _exact_source(rows: np.ndarray, source_dtype: str) -> np.ndarray:
    if source_dtype not in SOURCE_DTYPES:
        raise InputError(f"source_dtype {source_dtype!r}: choose from {', '.join(SOURCE_DTYPES)}")
    if rows.dtype == SOURCE_DTYPES[source_dtype]:
        return source_words(rows, source_dtype)
    exact = rows.astype(SOURCE_DTYPES[source_dtype]).astype(np.float32)
    if not np.array_equal(exact, rows.astype(np.float32)):
        raise InputError(
            f"weight: 16-bit rows keep the source's numbers, and {source_dtype} does not hold them"
        )
    return source_words(rows, source_dtype)


def _round(
    rows: np.ndarray, width: int, group: int | None, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [c, k] and scales [c, g] of all rows at one width.

    Processes all rows, although some are not needed, because the quantizer is compiled once per
    shape.
    """
    c, k = rows.shape
    if group is None or group >= k:
        codes, scales = jax.device_get(quantize_rows(rows, width, grid=grid))
        return codes, scales
    whole = k // group * group
    codes, scales = jax.device_get(
        quantize_rows(rows[:, :whole].reshape(-1, group), width, grid=grid)
    )
    codes, scales = codes.reshape(c, whole), scales.reshape(c, -1)
    if whole == k:
        return codes, scales
    # The last group is shorter. It cannot be padded with zeros: the odd grid has no code for them.
    tail = jax.device_get(quantize_rows(rows[:, whole:], width, grid=grid))
    return np.concatenate([codes, tail[0]], axis=1), np.concatenate([scales, tail[1]], axis=1)


def _check_rows(
    codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], group: int | None
) -> None:
    groups = 1 if group is None else -(-shape[1] // group)
    if codes.shape != shape or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes: expected integers {list(shape)}, got {codes.dtype}{codes.shape}")
    if scales.shape != (shape[0], groups):
        raise InputError(f"scales: expected [{shape[0]}, {groups}], got {list(scales.shape)}")


def _exact_scales(scales: np.ndarray) -> np.ndarray:
    rounded = scales.astype(ml_dtypes.bfloat16)
    if not np.array_equal(rounded.astype(np.float32), scales.astype(np.float32)):
        raise InputError("scales: bfloat16, in which they are stored, does not hold them exactly")
    return rounded
