"""Quantizer grids of one output channel (docs/mathematics.md section 1).

A row w in R^k at b bits has a scale s, a bfloat16 number, because that is what is stored, and
integer codes q, so that w_hat = s q. There are two grids.

"rtn", round to nearest: the grid of QVLA (arXiv 2602.03782) and of uniform baselines,

    qmax = 2^(b-1) - 1,   s = bf16(max|w| / qmax),   q = clip(round(w / s), -qmax - 1, qmax),

with ties rounded to even. The rounded scale may be smaller than the exact one by a factor of
1 - 2^-9 at most, so w / s exceeds qmax by at most 127 * 2^-9 < 1/2: nothing is clipped, and
|w - w_hat| <= s / 2.

"fitted", ours: codes are those of s = clip * max|w| / qmax, with the `clip` from a fixed list that
has the smallest squared error for the row; at 2 bits they are {-3, -1, 1, 3} instead of {-2, -1, 0,
1}. A row of Gaussian weights uses 3 of the 4 levels of the "rtn" grid at 2 bits and its squared
error is 63 % of its energy; on the offset grid it is 12 %. Below 8 bits the scale is then stretched
until <w, w_hat> = ||w||^2. Least squares shrinks rows (by 12 % at 2 bits), and while one shrunken
channel does little, thousands of them shrink the signal together: with the stretch the error of a
single 2-bit row grows to 13 % of its energy, but the errors of many add up as independent ones do.
(Scales without bias for the same reason: EDEN, arXiv 2108.08842.)
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Array, Float, Int, Int8
from qvla_jax.quantization.codes import GRID_BITS, PRUNED, SOURCE, Grid, code_map, levels

_SMALLEST_SCALE: Final = 2.0**-126
_LARGEST_SCALE: Final = float(jnp.finfo(jnp.bfloat16).max)
# Of the row's largest magnitude; 1 comes first and so wins ties.
_CLIPS: Final = (1.0, *(0.96 - 0.04 * i for i in range(20)))


def _scales(largest: Float[Array, "c 1"], clip: float | Array, top: int) -> Float[Array, "c 1"]:
    """bf16(clip * largest / top), positive and finite, in float32."""
    exact = largest * (clip / top)
    # A round trip through bfloat16 may be optimized away under jit; this may not.
    rounded = jax.lax.reduce_precision(exact, exponent_bits=8, mantissa_bits=7)
    return jnp.clip(rounded, _SMALLEST_SCALE, _LARGEST_SCALE)


def nearest_code(
    ratio: Float[Array, "..."], low: Any, high: Any, step: Any, offset: Any
) -> Float[Array, "..."]:
    """The code of `codes.levels` that is nearest to w / s, as float32."""
    return jnp.clip(step * jnp.round((ratio - offset) / step) + offset, low, high)


def _codes(
    weight: Float[Array, "c k"], scale: Float[Array, "c 1"], bits: int, grid: Grid
) -> Float[Array, "c k"]:
    """Nearest code of every weight, as float32."""
    return nearest_code(weight / scale, *levels(bits, grid))


@functools.partial(jax.jit, static_argnames=("bits", "grid"))
def quantize_rows(
    weight: Float[Array, "c k"],
    bits: int,
    *,
    grid: Grid = "rtn",
    clips: Float[Array, "c 1"] | None = None,
) -> tuple[Int8[Array, "c k"], Float[Array, "c 1"]]:
    """Codes and scales of all rows at one bit-width.

    Args:
        weight: rows, any floating type, finite.
        bits: 2, 3, 4 or 8.
        grid: "rtn" or "fitted".
        clips: from `fitted_clips`, if they are known already; for "fitted".

    Returns:
        int8 codes, and positive float32 scales that bfloat16 holds exactly. A row of zeros, or one
        too small for a normal bfloat16 scale, gets the smallest normal number.

    Raises:
        InputError: `bits` has no grid.
    """
    top = code_map(bits, grid).highest(bits)
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=1, keepdims=True)
    if grid == "rtn":
        scale = _scales(largest, 1.0, top)
        return _codes(weight, scale, bits, grid).astype(jnp.int8), scale
    # Rows are scaled to 1, so that squares of tiny or huge weights stay finite.
    unit = weight / jnp.maximum(largest, _SMALLEST_SCALE)
    clip = _best_clips(unit, bits, top) if clips is None else clips
    if bits == 8:
        scale = _scales(largest, clip, top)
        return _codes(weight, scale, bits, grid).astype(jnp.int8), scale
    codes = _codes(unit, clip / top, bits, grid)
    # The least squared error shrinks a row; <w, w_hat> = ||w||^2 undoes that.
    energy = jnp.sum(unit * unit, axis=1, keepdims=True)
    onto = jnp.sum(unit * codes, axis=1, keepdims=True)
    stretch = energy / jnp.maximum(onto, _SMALLEST_SCALE)
    return codes.astype(jnp.int8), _scales(largest, stretch, 1)


@functools.partial(jax.jit, static_argnames="grid")
def quantize_mixed(
    weight: Float[Array, "c k"], bits: Int[Array, " c"], *, grid: Grid
) -> tuple[Float[Array, "c k"], Float[Array, "c 1"]]:
    """As `quantize_rows` where every row has bits of its own, which are data.

    One compiled program serves all mixes of bit-widths, where `quantize_rows` is compiled anew for
    each of them.

    Args:
        weight: rows, any floating type, finite.
        bits: of each row; those without a grid get the numbers of 8 bits.
        grid: "rtn" or "fitted".

    Returns:
        Codes and scales in float32, those of `quantize_rows` bit for bit unless an outer `jit` lets
        XLA fuse the sums over rows with something else.
    """
    weight = weight.astype(jnp.float32)
    own_levels = mixed_levels(bits, grid)
    tops = [code_map(b, grid).highest(b) for b in GRID_BITS]
    # As XLA divides by a constant, which the largest code is in `quantize_rows`.
    share = _of_bits(bits, np.float32(1) / np.asarray(tops, np.float32))
    largest = jnp.max(jnp.abs(weight), axis=1, keepdims=True)
    if grid == "rtn":
        scale = _scales(largest, share, 1)
        return nearest_code(weight / scale, *own_levels), scale
    unit = weight / jnp.maximum(largest, _SMALLEST_SCALE)

    def error(clip: Array) -> Float[Array, "c 1"]:
        step = clip * share
        change = step * nearest_code(unit / step, *own_levels) - unit
        return jnp.sum(jnp.square(change), axis=1, keepdims=True)

    clips = jnp.asarray(_CLIPS, jnp.float32)
    clip = clips[jnp.argmin(jax.lax.map(error, clips), axis=0)]
    # Below 8 bits the scale is stretched; see `quantize_rows`.
    plain = _scales(largest, clip * share, 1)
    codes = nearest_code(unit / (clip * share), *own_levels)
    energy = jnp.sum(unit * unit, axis=1, keepdims=True)
    onto = jnp.sum(unit * codes, axis=1, keepdims=True)
    stretched = _scales(largest, energy / jnp.maximum(onto, _SMALLEST_SCALE), 1)
    is_stretched = _of_bits(bits, np.asarray(GRID_BITS) < 8)
    return (
        jnp.where(is_stretched, codes, nearest_code(weight / plain, *own_levels)),
        jnp.where(is_stretched, stretched, plain),
    )


def mixed_levels(bits: Int[Array, " c"], grid: Grid) -> Float[Array, "4 c 1"]:
    """`levels` of every row; those of 8 bits where a row's bits have no grid."""
    return jnp.stack(
        [
            _of_bits(bits, np.asarray(each, np.float32))
            for each in zip(*(levels(b, grid) for b in GRID_BITS), strict=True)
        ]
    )


def _of_bits(bits: Int[Array, " c"], values: np.ndarray) -> Array:
    """The value, of those for `GRID_BITS`, that belongs to each row: [c, 1]."""
    table = np.full(SOURCE + 1, values[GRID_BITS.index(8)], values.dtype)
    table[list(GRID_BITS)] = values
    return jnp.asarray(table)[bits][:, None]


@functools.partial(jax.jit, static_argnames="bits")
def fitted_clips(weight: Float[Array, "c k"], bits: int) -> Float[Array, "c 1"]:
    """The clip of least squared error of every row on the "fitted" grid.

    The search takes 21 passes over the weights; keep the result to quantize the same rows
    repeatedly.

    Raises:
        InputError: `bits` has no grid.
    """
    top = code_map(bits, "fitted").highest(bits)
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=1, keepdims=True)
    return _best_clips(weight / jnp.maximum(largest, _SMALLEST_SCALE), bits, top)


def _best_clips(unit: Float[Array, "c k"], bits: int, top: int) -> Float[Array, "c 1"]:
    """For rows of largest magnitude 1, the clip of least squared error."""

    def error(clip: Array) -> Float[Array, "c 1"]:
        step = jnp.full_like(unit[:, :1], clip / top)
        change = step * _codes(unit, step, bits, "fitted") - unit
        return jnp.sum(jnp.square(change), axis=1, keepdims=True)

    clips = jnp.asarray(_CLIPS, jnp.float32)
    return clips[jnp.argmin(jax.lax.map(error, clips), axis=0)]


def dequantize_rows(codes: Int8[Array, "c k"], scale: Float[Array, "c 1"]) -> Float[Array, "c k"]:
    """w_hat = s q in float32; exact, for a code has 8 significant bits and a scale as many."""
    return codes.astype(jnp.float32) * scale


def on_grid(
    weight: Float[Array, "c k"],
    bits: int,
    *,
    grid: Grid = "rtn",
    clips: Float[Array, "c 1"] | None = None,
) -> Float[Array, "c k"]:
    """w_hat in float32 of every row at one of `BITS`.

    0 gives zeros (the pruned row), 16 the weight itself. float32, because
    bfloat16 does not hold the product of a code and a scale.
    """
    source = weight.astype(jnp.float32)
    if bits == SOURCE:
        return source
    if bits == PRUNED:
        return jnp.zeros_like(source)
    return dequantize_rows(*quantize_rows(weight, bits, grid=grid, clips=clips))


@functools.partial(jax.jit, static_argnames=("options", "grid"))
def changes_on_grid(
    weight: Float[Array, "c k"],
    options: tuple[int, ...],
    *,
    grid: Grid,
    clips: Mapping[int, Float[Array, "c 1"]],
) -> Float[Array, "n c k"]:
    """w_hat - w of every row under every option, rounded to nearest.

    Args:
        weight: rows, any floating type, finite.
        options: out of `BITS`.
        grid: "rtn" or "fitted".
        clips: bits -> `fitted_clips`, for those that are known already.
    """
    source = weight.astype(jnp.float32)
    return jnp.stack([on_grid(source, b, grid=grid, clips=clips.get(b)) - source for b in options])
