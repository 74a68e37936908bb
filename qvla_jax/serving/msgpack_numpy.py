"""The openpi messages: msgpack, numpy arrays as maps of data, dtype and shape.

The format is that of `openpi_client.msgpack_numpy` (openpi-client 0.1.2), whose keys are bytes.
That of vla-eval (0.8), whose keys are text, and whose images are JPEG or PNG files unless told
otherwise, is read and written, too. Neither can hold Python objects; this decoder also bounds what
a message can make it allocate: no length is trusted before its bytes have arrived, and containers
are limited in number and length.
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
# What describes an array.
_PARTS: Final = ("data", "dtype", "shape")


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
            return checked_array(*(value.get(part.encode()) for part in _PARTS))
        if b"__npgeneric__" in value:
            return scalar(value.get(b"data"))
        if "__ndarray__" in value or ("__image__" in value and value.get("format") == "raw"):
            return checked_array(*(value.get(part) for part in _PARTS))
        if "__image__" in value:
            return _file(value)
        if {b"nd", b"type"} <= value.keys() or {"nd", "type"} <= value.keys():
            raise InputError(
                "message: arrays as the package msgpack-numpy writes them (nd, type, shape, data); "
                "pack with openpi_client.msgpack_numpy, or as maps of __ndarray__, data, dtype and "
                "shape"
            )
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


def encode(content: dict[str, Any], *, text_keys: bool = False) -> bytes:
    """A map of arrays, numbers, text and further maps -> one message.

    Args:
        content: the map.
        text_keys: describe arrays with text for keys, as vla-eval does, not with bytes.
    """
    message: Any = msgpack.packb(content, default=_text_array if text_keys else _array)
    return message


def _file(value: dict[Any, Any]) -> bytes:
    """The picture in a map, to be decoded with the observation."""
    data, kind = value.get("data"), value.get("format")
    if kind not in ("jpeg", "png") or not isinstance(data, bytes):
        raise InputError("message: __image__: expected format raw, jpeg or png, and data in bytes")
    return data


def _text_array(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.str not in DTYPES:
        raise TypeError(f"no message holds {type(value).__name__}")
    parts = (value.tobytes(), value.dtype.str, value.shape)
    return {"__ndarray__": True, **dict(zip(_PARTS, parts, strict=True))}


def _array(value: Any) -> dict[bytes, Any]:
    return {key.encode(): part for key, part in _text_array(value).items()}
