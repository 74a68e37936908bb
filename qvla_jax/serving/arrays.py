"""Arrays in messages: a client's description is checked against the received bytes."""

import math
from typing import Any, Final

import numpy as np

from qvla_jax.errors import InputError

# Dtypes of cameras, joints and their messages. A client's text never reaches `np.dtype`.
DTYPES: Final = {
    dtype.str: dtype
    for dtype in map(
        np.dtype,
        ("?", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"),
    )
}
MAX_DIMENSIONS: Final = 4
# Arrays, lists and maps in one message.
MAX_CONTAINERS: Final = 64
# Entries of a list or a map. Longer ones come as arrays.
MAX_ENTRIES: Final = 64


def checked_array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """A read-only array on the bytes of a message; nothing is copied.

    Args:
        data: bytes, or a view of them.
        dtype: the client's declaration: numpy's text for a little-endian number, such as `<f4`.
        shape: the client's declaration: a list of lengths.

    Raises:
        InputError: another kind of number, or not the number of bytes that dtype and shape require.
    """
    if not isinstance(data, bytes | memoryview):
        raise InputError(f"array: data is {_kind(data)}, expected bytes")
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise InputError(f"array: dtype {_short(dtype)}; accepted: {', '.join(DTYPES)}")
    lengths = list(shape) if isinstance(shape, list | tuple) else None
    if lengths is None or len(lengths) > MAX_DIMENSIONS or not all(map(_is_length, lengths)):
        raise InputError(
            f"array: shape {_short(shape)}; expected a list of at most {MAX_DIMENSIONS} lengths"
        )
    size = math.prod(lengths) * known.itemsize
    if size != len(data):
        raise InputError(
            f"array: {known.name} of shape {lengths} takes {size} bytes, the message holds "
            f"{len(data)}"
        )
    # A size of 0 leaves the lengths unchecked, and numpy multiplies them without the 0.
    if any(length > len(data) for length in lengths):
        raise InputError(f"array: shape {lengths} is empty")
    return np.frombuffer(data, known).reshape(lengths)


def scalar(value: Any) -> bool | int | float | str:
    """The value of a numpy scalar, whose dtype is irrelevant here.

    Raises:
        InputError: it is not a number, boolean or text.
    """
    if not isinstance(value, bool | int | float | str):
        raise InputError(f"array: a scalar is {_kind(value)}, expected a number")
    return value


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(value: Any) -> str:
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
