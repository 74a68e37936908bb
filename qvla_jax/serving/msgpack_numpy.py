"""The openpi messages: msgpack, numpy arrays as maps of data, dtype and shape.

The format is that of `openpi_client.msgpack_numpy` (openpi-client 0.1.2), whose keys are bytes. It
cannot hold Python objects; this decoder also bounds what a message can make it allocate: no length
is trusted before its bytes have arrived, and containers are limited in number and length.
"""

from typing import Any, Final

import msgpack
import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.serving.arrays import (
    DTYPES,
    MAX_CONTAINERS,
    MAX_ENTRIES,
    checked_array,
    scalar,
)

# Longest text, in bytes of UTF-8.
MAX_TEXT: Final = 8192


class _Containers:
    """Counts the containers of one message, and turns those that represent arrays into arrays."""

    def __init__(self) -> None:
        self._count = 0

    def list(self, value: list[Any]) -> list[Any]:
        self._count += 1
        if self._count > MAX_CONTAINERS:
            raise InputError(f"message: more than {MAX_CONTAINERS} lists and maps")
        return value

    def map(self, value: dict[Any, Any]) -> Any:
        self.list([])
        if b"__ndarray__" in value:
            return checked_array(*(value.get(key) for key in (b"data", b"dtype", b"shape")))
        if b"__npgeneric__" in value:
            return scalar(value.get(b"data"))
        return value


def decode(message: bytes) -> dict[str, Any]:
    """One message -> its top-level map, arrays on the message's own bytes.

    Raises:
        InputError: not msgpack, not a map with text for keys, or beyond the limits.
    """
    containers = _Containers()
    try:
        content = msgpack.unpackb(
            message,
            object_hook=containers.map,
            list_hook=containers.list,
            max_str_len=MAX_TEXT,
            max_bin_len=len(message),
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InputError(f"message: not a msgpack observation ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError("message: expected a map from names to arrays and text")
    return content


def encode(content: dict[str, Any]) -> bytes:
    """A map of arrays, numbers, text and further maps -> one message."""
    message: Any = msgpack.packb(content, default=_array)
    return message


def _array(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.str not in DTYPES:
        raise TypeError(f"no message holds {type(value).__name__}")
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }
