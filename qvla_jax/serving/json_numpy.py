"""The REST messages: JSON, numpy arrays as objects with base64 data, dtype and shape.

The format is that of the package json-numpy, which OpenVLA's clients use. Arrays are cut out of a
message before its JSON is parsed, so that parsing, whose lists and strings can take many times the
bytes they come from, only ever sees a small text. So are strings that hold a JPEG or PNG file in
base64, or its `data:` address.
"""

import base64
import binascii
import json
import re
from typing import Any, Final

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.serving.arrays import DTYPES, MAX_CONTAINERS, checked_array

# Longest JSON without its arrays, in bytes.
MAX_JSON: Final = 64 * 1024
# The data of an array: quotes are escaped where JSON is inside a string of JSON. Within other text
# they never match on both sides of the key.
_DATA: Final = re.compile(
    rb'(\\?")__numpy__\1 *: *\1([A-Za-z0-9+/=]*)\1'
    rb'|(\\?")(?:data:image/[a-z]{3,4};base64,)?((?:/9j/|iVBORw0KGgo)[A-Za-z0-9+/=]*)\3'
)


class _Arrays:
    """The data of the arrays cut out of a message."""

    def __init__(self, message: bytes) -> None:
        self._message = memoryview(message)
        self._places: dict[int, tuple[int, int]] = {}
        self.json = _DATA.sub(self._cut, message)

    def _cut(self, match: re.Match[bytes]) -> bytes:
        number = len(self._places)
        if number == MAX_CONTAINERS:
            raise InputError(f"message: more than {MAX_CONTAINERS} arrays and pictures")
        quote = match[1] or match[3]
        self._places[number] = match.span(2 if match[1] else 4)
        if match[1]:
            return b"%b__numpy__%b: %d" % (quote, quote, number)
        return b"{%b__picture__%b: %d}" % (quote, quote, number)

    def hook(self, value: dict[str, Any]) -> Any:
        """Puts arrays in place of the objects that represent them, and bytes for pictures."""
        if "__numpy__" in value:
            data = self._bytes("__numpy__", value["__numpy__"])
            return checked_array(data, value.get("dtype"), value.get("shape"))
        if "__picture__" in value:
            return self._bytes("__picture__", value["__picture__"])
        return value

    def _bytes(self, kind: str, number: Any) -> bytes:
        place = self._places.pop(number, None) if type(number) is int else None
        if place is None:
            raise InputError(f"message: {kind}: expected the array's bytes in base64")
        try:
            return binascii.a2b_base64(self._message[slice(*place)], strict_mode=True)
        except binascii.Error as error:
            raise InputError(f"message: {kind}: no base64 ({error})") from error

    def check_used(self) -> None:
        """Raises an `InputError` if text only looked like an array or a picture."""
        if self._places:
            raise InputError("message: __numpy__ or a picture in base64 where none can be")


def decode(message: bytes) -> tuple[dict[str, Any], bool]:
    """Decodes a request's body into its object, and whether it was encoded twice.

    `{"encoded": TEXT}` holds the object as JSON within JSON, for clients without json-numpy.

    Raises:
        InputError: not JSON, not an object, or beyond the limits.
    """
    arrays = _Arrays(message)
    if len(arrays.json) > MAX_JSON:
        raise InputError(
            f"message: {len(arrays.json)} bytes of JSON without the arrays, expected at most "
            f"{MAX_JSON}; send images and state as json-numpy does"
        )
    content = _parse(arrays, arrays.json)
    twice = "encoded" in content
    if twice:
        if len(content) > 1 or not isinstance(content["encoded"], str):
            raise InputError("message: 'encoded' must be text, and stand alone")
        content = _parse(arrays, content["encoded"])
    arrays.check_used()
    return content, twice


def _parse(arrays: _Arrays, text: str | bytes) -> dict[str, Any]:
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        content = json.loads(text, object_hook=arrays.hook, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"message: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError("message: expected an object with arrays and text")
    return content


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def encode(content: Any) -> str:
    """Arrays, numbers, text, lists and objects -> JSON."""
    return json.dumps(content, default=_array)


def _array(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.str not in DTYPES:
        raise TypeError(f"no message holds {type(value).__name__}")
    return {
        "__numpy__": base64.b64encode(value.tobytes()).decode(),
        "dtype": value.dtype.str,
        "shape": value.shape,
    }
