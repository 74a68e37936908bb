"""Images that come as JPEG or PNG files: the header is checked before anything is decoded."""

import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from PIL import Image

from qvla_jax.array_typing import UInt8
from qvla_jax.errors import InputError

# What files of these formats begin with.
_STARTS: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# Each is decoded to at most three bytes for a pixel, however few bytes it takes itself.
MAX_PICTURES: Final = 8
_ORIENTATION: Final = 0x0112


def decode_pictures(message: Mapping[str, Any], max_side: int) -> dict[str, Any]:
    """The entries of a message, and those of its maps, with arrays in place of encoded pictures.

    Args:
        message: a client's entries; bytes that are no JPEG or PNG stay as they are.
        max_side: largest side of a picture, in pixels.

    Raises:
        InputError: a picture is too large, broken, or not plain RGB, or there are too many.
    """
    left = MAX_PICTURES

    def decoded(name: str, value: Any) -> Any:
        nonlocal left
        if not isinstance(value, bytes) or not value.startswith(_STARTS):
            return value
        if left == 0:
            raise InputError(f"message: more than {MAX_PICTURES} JPEG or PNG pictures")
        left -= 1
        return decode_picture(name, value, max_side)

    return {
        key: {inner: decoded(str(inner), entry) for inner, entry in value.items()}
        if isinstance(value, dict)
        else decoded(key, value)
        for key, value in message.items()
    }


def decode_picture(name: str, data: bytes, max_side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a JPEG or PNG file.

    Args:
        name: of the entry, for error messages.
        data: the file.
        max_side: largest side, in pixels.

    Raises:
        InputError: it is too large, broken, or not plain RGB.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            _check(name, picture, max_side)
            return np.array(picture)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise InputError(f"{name[:60]}: not readable as a JPEG or PNG picture ({error})") from error


def _check(name: str, picture: Image.Image, max_side: int) -> None:
    """Reads the header only."""
    if max(picture.size) > max_side:
        width, height = picture.size
        raise InputError(
            f"{name[:60]}: {height} x {width} pixels, expected at most {max_side} on each side"
        )
    if picture.mode != "RGB":
        raise InputError(f"{name[:60]}: a picture of mode {picture.mode}, expected RGB")
    if getattr(picture, "is_animated", False):
        raise InputError(f"{name[:60]}: a picture that moves, expected a single one")
    if (turned := picture.getexif().get(_ORIENTATION, 1)) != 1:
        raise InputError(
            f"{name[:60]}: a picture to be turned (EXIF orientation {turned}); turn it before it "
            "is sent"
        )
