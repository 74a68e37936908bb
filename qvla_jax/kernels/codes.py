"""Integer codes in 32-bit words: the bit layout of a packed row.

Code i of a row with b bits a code occupies the bits [i b, (i + 1) b) of a little-endian bit stream
that is cut into 32-bit words; the bits after the last code are zero. At 2, 4, 8 and 16 bits every
code is in one word; at 3 bits some straddle two.

Stored codes are unsigned, u in [0, 2^b); `quantization.codes` says what they stand for. The
functions take numpy or JAX arrays and return the same kind.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import AnyArray, Int, UInt8
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import CodeMap

WORD_BITS = 32


def held_bits(bits: int) -> int:
    """Width of the fields in which backends hold codes: 3-bit codes take 4 bits."""
    return 4 if bits == 3 else bits


def array_module(*arrays: Any) -> ModuleType:
    """`numpy` for numpy arrays, `jax.numpy` if any array is a JAX array."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def num_words(k: int, bits: int) -> int:
    """Words of a row of k codes."""
    return -(-k * bits // WORD_BITS)


def to_unsigned(
    codes: Int[np.ndarray, "c k"], bits: int, map_: CodeMap
) -> UInt8[np.ndarray, "c k"]:
    """The unsigned codes u of the codes q.

    Raises:
        InputError: a code is not among those of the map.
    """
    u, rest = np.divmod(codes.astype(np.int32) - map_.offset, map_.multiplier)
    bad = (rest != 0) | (u < 0) | (u >= 2**bits)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        allowed = map_.multiplier * np.arange(2**bits) + map_.offset
        raise InputError(
            f"codes: row {row}, column {column} holds {codes[row, column]}, which is none of the "
            f"{bits}-bit codes {allowed[0]}, {allowed[1]}, ... {allowed[-1]}"
        )
    return u.astype(np.uint8)


def pack_words(unsigned: AnyArray, bits: int) -> AnyArray:
    """Unsigned integers [c, k] below 2^bits -> uint32 words [c, num_words(k, bits)]."""
    xp = array_module(unsigned)
    c, k = unsigned.shape
    # Codes and words meet every lcm(bits, 32) bits: 32 / bits codes a word, or 32 codes in 3 words.
    per_period = WORD_BITS // bits if WORD_BITS % bits == 0 else WORD_BITS
    words = per_period * bits // WORD_BITS
    periods = -(-k // per_period)
    u = xp.pad(unsigned.astype(xp.uint32), ((0, 0), (0, periods * per_period - k)))
    u = u.reshape(c, periods, per_period)
    columns = [xp.zeros((c, periods), xp.uint32) for _ in range(words)]
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD_BITS)
        columns[word] = columns[word] | (u[:, :, i] << xp.uint32(shift))
        if shift + bits > WORD_BITS:
            columns[word + 1] = columns[word + 1] | (u[:, :, i] >> xp.uint32(WORD_BITS - shift))
    return xp.stack(columns, axis=2).reshape(c, periods * words)[:, : num_words(k, bits)]


def unpack_words(words: AnyArray, bits: int, k: int) -> AnyArray:
    """Inverse of `pack_words`: uint8 [c, k], or uint16 for 16 bits."""
    xp = array_module(words)
    c = words.shape[0]
    kind = xp.uint16 if bits > 8 else xp.uint8
    if xp is np and bits in (2, 4, 8):
        # Byte by byte, which takes an eighth of the memory and time; large files are loaded this
        # way.
        data = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
        codes = np.empty((c, data.shape[1], 8 // bits), np.uint8)
        for i in range(8 // bits):
            codes[:, :, i] = (data >> np.uint8(i * bits)) & np.uint8(2**bits - 1)
        return codes.reshape(c, -1)[:, :k]
    if WORD_BITS % bits == 0:
        # Few operations, because every layer of a traced model holds them.
        shifts = xp.arange(0, WORD_BITS, bits, dtype=xp.uint32)
        codes = (words[:, :, None] >> shifts[None, None]) & xp.uint32(2**bits - 1)
        return codes.astype(kind).reshape(c, -1)[:, :k]
    per_period, size = WORD_BITS, bits
    periods = -(-k // per_period)
    columns = xp.pad(words, ((0, 0), (0, periods * size - words.shape[1])))
    columns = columns.reshape(c, periods, size)
    codes = []
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD_BITS)
        code = columns[:, :, word] >> xp.uint32(shift)
        if shift + bits > WORD_BITS:
            code = code | (columns[:, :, word + 1] << xp.uint32(WORD_BITS - shift))
        codes.append((code & xp.uint32(2**bits - 1)).astype(kind))
    return xp.stack(codes, axis=2).reshape(c, periods * per_period)[:, :k]
