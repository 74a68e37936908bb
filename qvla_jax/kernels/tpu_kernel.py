"""The body of the TPU kernel: what one step of the grid does with one block of words.

Words are unpacked in their bytes, four inputs at once: a shift and a mask bring each field to the
upper end of its byte, so that the bytes of a plane are int8 numbers, codes times a power of two
that the scales take back. Nothing is rounded and nothing is subtracted later. In that form planes
are multiplied by int8 activations, or are converted to the type of x first.

A few rows of x are multiplied in int8 whatever their type, because the matrix unit then takes half
the time and unpacked planes are half as large: they are rounded to multiples of 2^-30 of the power
of two above the row's largest magnitude, and the four bytes of these integers are four rows of int8
numbers, whose products are summed exactly and joined at the end.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qvla_jax.array_typing import Array, Float, Int8, Int32
from qvla_jax.quantization.codes import SOURCE, CodeMap

LANES: Final = 128
UNIT: Final = 8  # bits of a unit of the words: see `kernels.tiles`
# Bytes of a 32-bit integer: rows of int8 numbers for each row of x.
DIGITS: Final = 4
# Makes the lower three bytes of an integer signed, and hence carries into the next.
_CARRY: Final = np.int32(0x00808080)
# Words of rows that are ordered at once: registers that do not spill.
_STORED: Final = 16
# Vectors of outputs that are ordered side by side, where rows are few.
_UNROLL: Final = 4
# Rows of vectors of x that are worked on at once.
_SIDE_BY_SIDE: Final = 512
# Of products of int8 or bfloat16 numbers, which are exact: the matrix unit takes no other, whatever
# `jax.default_matmul_precision` says.
_EXACT: Final = jax.lax.Precision.DEFAULT


def code_scale(bits: int, codes: CodeMap) -> float:
    """What unpacked bytes must be multiplied by to be codes q."""
    return 1.0 if bits == SOURCE else codes.multiplier / 2 ** (UNIT - bits)


def unpack(
    words: Int32[Array, "depth n"], bits: int, plane: int, codes: CodeMap
) -> Int8[Array, "inputs n"] | Float[Array, "inputs n"]:
    """A plane: codes over `code_scale`, or the bfloat16 numbers of 16-bit rows.

    Args:
        words: the words of a block.
        bits: the width of its tile.
        plane: 0 to 8 / bits - 1.
        codes: the integers that stored codes of this tile stand for.
    """
    if bits == SOURCE:
        return pltpu.bitcast(words, jnp.bfloat16)
    above = UNIT - bits * (plane + 1)
    field = words << above if above else words
    if bits < UNIT:
        field = field & _in_bytes((2**bits - 1) << (UNIT - bits))
        if codes.multiplier == 2:  # q = 2 s + 1
            field = field | _in_bytes(2 ** (UNIT - bits - 1))
    return pltpu.bitcast(field, jnp.int8)


def _in_bytes(value: int) -> np.int32:
    """A word with the value in every byte."""
    return np.uint32(value * 0x01010101).view(np.int32)


def dot(x: Array, plane: Array) -> Array:
    """`x` times a plane; sums in int32 or float32."""
    if x.dtype == jnp.int8:
        return jnp.dot(x, plane, precision=_EXACT, preferred_element_type=jnp.int32)
    if x.dtype == jnp.float32:
        plane = plane.astype(jnp.float32)
        return jnp.dot(x, plane, precision=jax.lax.Precision.HIGHEST)
    plane = plane.astype(jnp.bfloat16)
    return jnp.dot(x, plane, precision=_EXACT, preferred_element_type=jnp.float32)


def clear_beyond(x: Any, inputs: int) -> None:
    """Writes zeros where a block of x reaches beyond its inputs: codes there may not be zero."""
    first = inputs // LANES * LANES
    for start in range(first, x.shape[1], LANES):
        here = slice(start, start + LANES)
        if start < inputs:
            lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
            part = x[:, here].astype(jnp.float32)
            x[:, here] = jnp.where(lane < inputs - start, part, 0.0).astype(x.dtype)
        else:
            x[:, here] = jnp.zeros((x.shape[0], LANES), x.dtype)


def round_rows(x: Any, inverse: Any, codes: Any, largest: int) -> None:
    """Rows of x -> their codes; see `activations.activation_scales`.

    Args:
        x: ref, bfloat16 or float32 [rows, k].
        inverse: ref, float32 [rows, 128].
        codes: ref, int8 [rows, k].
        largest: the largest code.
    """

    def some(here: Any) -> None:
        whole = jnp.round(x[:, here].astype(jnp.float32) * inverse[...])
        codes[:, here] = jnp.clip(whole, -largest, largest).astype(jnp.int32).astype(jnp.int8)

    _over_vectors(x, some)


def _over_vectors(x: Any, run: Callable[[Any], None]) -> None:
    """Runs a function for every 128 inputs, some at a time, so that latencies overlap."""
    vectors, most = x.shape[1] // LANES, max(_SIDE_BY_SIDE // x.shape[0], 1)
    each = next(n for n in range(most, 0, -1) if vectors % n == 0)

    @pl.loop(0, vectors // each)
    def _(i: Array) -> None:
        for j in range(each):
            run(pl.ds(pl.multiple_of((i * each + j) * LANES, LANES), LANES))


def split(x: Any, digits: Any, scale: Any) -> None:
    """Rows of x -> their digits, and what the lowest digit stands for.

    Args:
        x: ref, bfloat16 or float32 [rows, k], of which the first digits.shape[0] / 4 count.
        digits: ref, int8 [4 rows, k]: row d rows + r is byte d of row r.
        scale: ref, float32 [rows, 128]; NaN for rows that hold NaN or infinity.
    """
    rows = digits.shape[0] // DIGITS
    scale[...] = jnp.zeros(scale.shape, jnp.float32)

    def find(here: Any) -> None:
        # Bits of magnitudes are in the order of the magnitudes, and those of NaN above all.
        bits = pltpu.bitcast(x[:rows, here].astype(jnp.float32), jnp.int32) & np.int32(2**31 - 1)
        found = jnp.maximum(pltpu.bitcast(scale[...], jnp.int32), bits)
        scale[...] = pltpu.bitcast(found, jnp.float32)

    _over_vectors(x, find)
    top = pltpu.bitcast(scale[...], jnp.int32) >> 23
    exponent = top.astype(jnp.float32).max(axis=1, keepdims=True)
    exponent = jnp.broadcast_to(jnp.maximum(exponent, 64.0), scale.shape).astype(jnp.int32)
    # 2^(29 - e) and its inverse, where 2^e is the power of two below the largest magnitude.
    inverse = pltpu.bitcast((283 - exponent) << 23, jnp.float32)
    own = pltpu.bitcast((exponent - 29) << 23, jnp.float32)
    scale[...] = jnp.where(exponent == 255, jnp.nan, own)

    def write(here: Any) -> None:
        # Magnitudes stay below 2^30.
        whole = (x[:rows, here].astype(jnp.float32) * inverse).astype(jnp.int32)
        whole = (whole + _CARRY) ^ _CARRY
        # To the upper end, and down again with the sign.
        parts = [whole << (24 - 8 * d) >> 24 for d in range(DIGITS)]
        digits[:, here] = jnp.concatenate(parts).astype(jnp.int8)

    _over_vectors(x, write)


def joined(total: Any) -> Float[Array, "rows n"]:
    """Sums of digits, a ref [4 rows, n] of int32 or float32 -> sums of rows."""
    rows = total.shape[0] // DIGITS
    parts = [
        total[d * rows : (d + 1) * rows].astype(jnp.float32) * np.float32(2.0 ** (8 * d))
        for d in range(DIGITS)
    ]
    return functools.reduce(jnp.add, parts)


def block_product(
    x: Any,
    words: Array,
    start: Array,
    *,
    bits: int,
    codes: CodeMap,
    scales: Any,
    step: int | None,
    halved: bool,
) -> Array:
    """Product of rows of x with a block of words.

    Args:
        x: ref [rows, k], the type in which planes are multiplied.
        words: of the block.
        start: its first input.
        bits: the width of its tile.
        codes: what codes in it stand for.
        scales: ref, float32 [k / step, n], times `code_scale`.
        step: inputs that a row of scales covers, which then are applied; None: none are.
        halved: whether x is converted to bfloat16.
    """
    planes = [unpack(words, bits, plane, codes) for plane in range(max(UNIT // bits, 1))]
    size = planes[0].shape[0]
    if step is None or bits == SOURCE:
        whole = jnp.concatenate(planes)
        given = x[:, pl.ds(pl.multiple_of(start, LANES), whole.shape[0])]
        return dot(given.astype(jnp.bfloat16) if halved else given, whole)
    total = None
    for number, plane in enumerate(planes):
        first = pl.multiple_of(start + number * size, LANES)
        above, each = jax.lax.div(first, np.int32(step)), min(step, size)
        rows = [scales[pl.ds(above + j, 1), :] for j in range(size // each)]
        if step % LANES:
            parts = [_finely_scaled(x[:, pl.ds(first, size)], plane, rows)]
        else:
            parts = [
                dot(x[:, pl.ds(first + j * each, each)], plane[j * each : (j + 1) * each])
                .astype(jnp.float32) * row
                for j, row in enumerate(rows)
            ]  # fmt: skip
        total = functools.reduce(jnp.add, parts if total is None else [total, *parts])
    assert total is not None
    return total


def _finely_scaled(
    x: Array, plane: Int8[Array, "inputs n"], scales: list[Float[Array, "1 n"]]
) -> Float[Array, "m n"]:
    """`x (s v)` with scales s of groups that are no multiple of 128 inputs.

    `s v` has at most 16 bits: 8 of v, 8 of the bfloat16 s.
    """
    inputs, lanes = plane.shape
    wide = [jnp.broadcast_to(row, (inputs // len(scales), lanes)) for row in scales]
    w = plane.astype(jnp.float32) * jnp.concatenate(wide)
    if x.dtype == jnp.float32:
        return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)
    x = x.astype(jnp.float32).astype(jnp.bfloat16)
    upper = w.astype(jnp.bfloat16)
    lower = (w - upper.astype(jnp.float32)).astype(jnp.bfloat16)
    product = functools.partial(jnp.dot, precision=_EXACT, preferred_element_type=jnp.float32)
    return product(x, upper) + product(x, lower)


def store(
    starts: Any, position: Any, bias: Any, done: Any, y: Any, *, runs: int, shared: int
) -> None:
    """Finished lanes -> outputs, 128 at a time.

    The lanes that a segment has for a vector of outputs are among 128 adjacent ones. These are in
    two vectors; a selection joins them, and a gather brings them to their outputs.

    Args:
        starts: ref, int32 [vectors runs + 2 shared]; see `TpuWeight`.
        position: ref, int32 [1, outputs], the lane of an output; -1: pruned.
        bias: ref, float32 [1, outputs], for pruned ones.
        done: ref, int32 [words, lanes]: lanes in the type of y, as many rows as a word holds.
        y: ref [rows, outputs].
        runs: starts of a vector.
        shared: pairs of vector and start at the end.
    """
    words, vectors = done.shape[0], y.shape[1] // LANES
    each = words if words <= _STORED else _STORED
    held = y.shape[0] // words
    lane = jax.lax.broadcasted_iota(jnp.int32, (each, LANES), 1)

    def place(vector: Array, begins: list[Array], *, anew: bool) -> None:
        here = pl.ds(pl.multiple_of(vector * LANES, LANES), LANES)
        wanted = jnp.broadcast_to(position[:, here], (each, LANES))
        low = wanted & (LANES - 1)
        pruned = jnp.broadcast_to(bias[:, here], (each * held, LANES)).astype(y.dtype)
        own = []
        for begin in begins:
            behind = wanted - begin
            both = [
                pl.ds(pl.multiple_of(((begin >> 7) + i) * LANES, LANES), LANES) for i in range(2)
            ]
            own.append((both, lane >= (begin & 127), (behind >= 0) & (behind < LANES)))
        for row in range(0, words, each):
            rows = pl.ds(row * held, each * held)
            result = pltpu.bitcast(pruned if anew else y[rows, here], jnp.int32)
            for both, is_lower, is_here in own:
                lower, upper = (done[pl.ds(row, each), lanes] for lanes in both)
                found = jnp.take_along_axis(
                    jnp.where(is_lower, lower, upper), low, axis=1, mode="promise_in_bounds"
                )
                result = jnp.where(is_here, found, result)
            y[rows, here] = pltpu.bitcast(result, y.dtype)

    @pl.loop(0, vectors, unroll=_UNROLL if each == words else 1)
    def _(vector: Array) -> None:
        place(vector, [starts[vector * runs + run] for run in range(runs)], anew=True)

    for pair in range(shared):
        at = vectors * runs + 2 * pair
        place(starts[at], [starts[at + 1]], anew=False)
