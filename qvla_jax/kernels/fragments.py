"""Fragments: operands in the order in which the tensor cores of NVIDIA GPUs take them.

A block of `kernels.tiles` is int32 [32, 128] for 128 channels, whatever its width. Here its words
lie as the threads of two warpgroups multiply by them: 16 rows for the first 64 channels, and 16 for
the others. A run of 64 inputs takes `bits` of these rows. A thread finds its words of a run next to
one another (four of them at 4 bits) and unpacks them where they are: that is its share of a matrix
[64, 64] that `mma` and `wgmma` take from registers. Thread 32 w + 4 g + p holds channels 16 w + g
and 16 w + g + 8, and of every 16 inputs the pairs at 2 p and at 2 p + 8.

So a register of that matrix has a pair of neighboring inputs, from the two halves of a word. Codes
become bfloat16 in place: masked, and under the exponent that makes their last bit worth one step,
they are numbers that differ from the codes by a constant. In the upper half that number is
negative, so that constants nearly cancel where they are taken off the sums instead.
"""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float, Int32
from qvla_jax.kernels.codes import WORD_BITS, array_module
from qvla_jax.quantization.codes import SOURCE, CodeMap

# Words and channels of a block.
DEPTH: Final = 32
LANES: Final = 128
# Channels of a warpgroup, and inputs of a run and of a step, which is one instruction.
ROWS: Final = 64
RUN: Final = 64
STEP: Final = 16
# Rows of x that an instruction takes at least.
COLUMNS: Final = 8
_HALF: Final = WORD_BITS // 2
# Shift to the right (negative: to the left) that brings a field of a half word into the mantissa,
# which has room for three fields of 2 bits.
_SHIFTS: Final = {4: (0, 4, 8, 12), 2: (-1, -1, -1, 5, 5, 5, 11, 11)}


class Field(NamedTuple):
    """How a field of both halves of a word becomes a pair of bfloat16 numbers: ... ^ flip."""

    shift: int
    mask: int
    flip: int
    # Number less code, in the lower and in the upper half.
    above: tuple[float, float]


def fields(bits: int, codes: CodeMap) -> list[Field]:
    """The fields of a half word, lowest first.

    Args:
        bits: 2 or 4; words hold s = u - 2^(bits-1) in two's complement.
        codes: the integers that stored codes u stand for.
    """
    found = []
    for number, shift in enumerate(_SHIFTS[bits]):
        position, highest = bits * number - shift, 2**bits - 1
        # Under this exponent the field's last bit is worth `multiplier`.
        base = float(codes.multiplier) * 2 ** (7 - position)
        exponent = int(np.float32(base).view(np.uint32)) >> _HALF
        # u has the upper bit of s flipped; the upper half holds -(base + multiplier (highest - u)).
        lower = exponent ^ (2 ** (bits - 1) << position)
        upper = 0x8000 ^ lower ^ (highest << position)
        above = (base - codes.offset, -(base + codes.multiplier * highest + codes.offset))
        found.append(Field(shift, _twice(highest << position), upper << _HALF | lower, above))
    return found


def _twice(half: int) -> int:
    return half << _HALF | half


def masks(bits: int, codes: CodeMap) -> list[int]:
    """What `pairs` keeps of words, each once."""
    if bits == 8:
        return [_twice(0x7F), _twice(0x80)]
    return [] if bits == SOURCE else sorted({field.mask for field in fields(bits, codes)})


def runs(bits: int) -> int:
    """Runs of inputs in a block."""
    return WORD_BITS // bits * DEPTH // RUN


def vector(bits: int) -> int:
    """Adjacent words of a run that a thread holds."""
    return min(bits, 4)


def register(bits: int, step: int, eight: int, half: int) -> tuple[int, int, int]:
    """Where a thread has a register of its matrix: vector of words, word in it, field.

    Args:
        bits: the width of the tile.
        step: which 16 inputs of the run.
        eight: which 8 of these.
        half: channel g, or g + 8.
    """
    if bits == 2:  # a word has both eights of inputs
        return 0, half, 2 * step + eight
    number, field = divmod(step, _HALF // bits)
    return number, 2 * eight + half, field


def _axes(bits: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Axes of 64 channels by 64 inputs, their order in words, and fields of a half word.

    Channels are (warp, half, g); inputs (vector, field, eight, p, which of the pair). Last in words
    are fields and halves of a word.
    """
    if bits == 2:
        return (4, 2, 8, 1, 4, 2, 4, 2), (3, 0, 2, 6, 1, 4, 5, 7), 8
    count = _HALF // bits
    return (4, 2, 8, 4 // count, count, 2, 4, 2), (3, 0, 2, 6, 5, 1, 4, 7), count


def blocked(codes: AnyArray, bits: int, depth: int, lanes: int) -> Int32[AnyArray, "g depth n"]:
    """Bit fields [T lanes, k] -> blocks, tile after tile; see `tiles.arrange`."""
    xp, (rows, k) = array_module(codes), codes.shape
    shape, order, count = _axes(bits)
    codes = xp.pad(codes, ((0, 0), (0, -k % (runs(bits) * RUN)))).astype(np.uint32)
    split = codes.reshape(rows // lanes, lanes // ROWS, *shape[:3], -1, runs(bits), *shape[3:])
    # tile, warpgroup, channels, block, run, inputs -> tile, block, warpgroup, run, words
    split = split.transpose(0, 5, 1, 6, *(axis + (2 if axis < 3 else 4) for axis in order))
    split = split.reshape(-1, count, 2)
    words = xp.zeros(split.shape[0], np.uint32)
    for field, half in np.ndindex(count, 2):
        words = words | (split[:, field, half] << xp.uint32(bits * field + _HALF * half))
    words = words.reshape(-1, depth, lanes)
    return jax.lax.bitcast_convert_type(words, jnp.int32) if xp is jnp else words.view(np.int32)


def unblocked(words: AnyArray, bits: int, tiles: int) -> AnyArray:
    """The inverse of `blocked`: [T lanes, padded k]."""
    xp = array_module(words)
    shape, order, count = _axes(bits)
    flat = words.reshape(-1).view(np.uint32)
    kind = np.uint16 if bits == SOURCE else np.uint8
    split = xp.stack(
        [
            ((flat >> xp.uint32(bits * field + _HALF * half)) & xp.uint32(2**bits - 1)).astype(kind)
            for field, half in np.ndindex(count, 2)
        ],
        axis=1,
    ).reshape(tiles, -1, LANES // ROWS, runs(bits), *(shape[axis] for axis in order))
    place = [4 + order.index(axis) for axis in range(len(order))]
    split = split.transpose(0, 2, *place[:3], 1, 3, *place[3:])
    return split.reshape(tiles * LANES, -1)


class Pairs(NamedTuple):
    """Registers of a run, field by field, and what their numbers are above the codes."""

    registers: list[Int32[Array, "bits lanes"]]
    # A constant, registers of the same shape, or nothing; for each field.
    above: list[tuple[float, float] | Int32[Array, "bits lanes"] | None]


def pairs(
    words: Int32[Array, "bits lanes"], bits: int, codes: CodeMap, constants: dict[int, Array]
) -> Pairs:
    """Codes as pairs of bfloat16 numbers, in the words' own places.

    Args:
        words: a run of 64 channels.
        bits: the width of its tile.
        codes: the integers that stored codes of this tile stand for.
        constants: arrays like `words`, filled with each of `masks`.
    """
    if bits == SOURCE:
        return Pairs([words], [None])
    if bits == 8:  # the lower 7 bits under the exponent of 128, less 128 or 256 by the sign
        parts = [words, _shifted(words, 8)]
        lower, sign = (constants[mask] for mask in masks(8, codes))
        flip = _twice(0x4300)
        return Pairs(
            [_masked(part, lower, flip) for part in parts],
            [_masked(part, sign, flip) for part in parts],
        )
    found = fields(bits, codes)
    shifted = {field.shift: _shifted(words, field.shift) for field in found}
    return Pairs(
        [_masked(shifted[f.shift], constants[f.mask], f.flip) for f in found],
        [field.above for field in found],
    )


def filled(like: Int32[Array, "bits lanes"], value: int) -> Int32[Array, "bits lanes"]:
    """An array of one value, any 32 bits."""
    return jax.lax.full_like(like, np.uint32(value).view(np.int32))


def pair_bits(pair: tuple[float, float]) -> int:
    """The 32 bits of two bfloat16 numbers, the first in the lower half."""
    lower, upper = (int(np.float32(number).view(np.uint32)) >> _HALF for number in pair)
    return upper << _HALF | lower


def _shifted(words: Array, by: int) -> Array:
    if by == 0:
        return words
    shift = filled(words, abs(by))
    return jax.lax.shift_left(words, shift) if by < 0 else jax.lax.shift_right_logical(words, shift)


def _masked(words: Array, mask: Array, flip: int) -> Array:
    kept = jax.lax.bitwise_and(words, mask)
    return jax.lax.bitwise_xor(kept, filled(words, flip))


def matrix(found: Pairs, bits: int) -> Float[Array, "rows run"]:
    """What threads hold after `pairs`: 64 channels by 64 inputs."""
    shape, order, _ = _axes(bits)
    numbers = []
    for register, above in zip(*found, strict=True):
        number = _numbers(register)
        if isinstance(above, tuple):
            number = number - _numbers(filled(register, pair_bits(above)))
        elif above is not None:
            number = number - _numbers(above)
        numbers.append(number.reshape(-1, 1, 2))
    split = jax.lax.concatenate(numbers, 1).reshape(tuple(shape[axis] for axis in order))
    place = tuple(order.index(axis) for axis in range(len(order)))
    return jax.lax.transpose(split, place).reshape(ROWS, RUN)


def constants_of(found: Pairs, bits: int) -> Float[np.ndarray, " run"]:
    """What numbers of each input are above the codes, where that is the same for all channels."""
    above = np.zeros((RUN // STEP, 2, 4, 2), np.float32)
    for step, eight in np.ndindex(RUN // STEP, 2):
        above[step, eight] = found.above[register(bits, step, eight, 0)[2]]
    return above.reshape(RUN).astype(jnp.bfloat16)


def _numbers(pair: Int32[Array, "..."]) -> Float[Array, "... 2"]:
    return jax.lax.bitcast_convert_type(pair, jnp.bfloat16)


def columns(x: Float[Array, "m k"]) -> Int32[Array, "runs tiles lane word"]:
    """Rows of x as the other operand: for 64 inputs and 8 rows, 8 words of each thread of a warp.

    Thread 4 g + p has row g, and of every 16 inputs the pairs at 2 p and at 2 p + 8.
    """
    m, k = x.shape
    split = x.reshape(m // COLUMNS, COLUMNS, k // RUN, RUN // STEP, 2, 4, 2)
    words = jax.lax.bitcast_convert_type(split.transpose(2, 0, 1, 5, 3, 4, 6), jnp.int32)
    return words.reshape(k // RUN, m // COLUMNS, 32, 8)


def restored_columns(words: Int32[Array, "tiles lane word"]) -> Float[Array, "m run"]:
    """The inverse of `columns` for a run."""
    tiles = words.shape[0]
    split = _numbers(words.reshape(tiles, COLUMNS, 4, RUN // STEP, 2))
    return jax.lax.transpose(split, (0, 1, 3, 4, 2, 5)).reshape(tiles * COLUMNS, RUN)
