"""Converts camera images to the tower's input, as openpi's policies do on the server."""

import numpy as np
from PIL import Image

from qvla_jax.array_typing import Float, UInt8
from qvla_jax.errors import InputError


def parse_image(
    image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."], *, where: str
) -> UInt8[np.ndarray, "H W 3"]:
    """An image of any layout that openpi takes -> uint8 with the channels last.

    Args:
        image: u8 or float in [0, 1], [H, W, 3] or [3, H, W].
        where: how errors refer to it.

    Raises:
        InputError: another shape or dtype.
    """
    image = np.asarray(image)
    if image.size and np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all() or image.min() < 0.0 or image.max() > 1.0:
            raise InputError(f"{where}: a float image must be in [0, 1]")
        image = (255 * image).astype(np.uint8)  # truncated, as there
    if image.ndim == 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"{where}: expected an image [H, W, 3] or [3, H, W], uint8 or float, got "
            f"{image.dtype} {list(image.shape)}"
        )
    return image


def resize_with_pad(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """PIL's bilinear to the largest size that fits, black around it (openpi-client's).

    Sides are truncated to whole pixels; the larger part of an odd margin comes last.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    inner_height, inner_width = int(height / ratio), int(width / ratio)
    if not inner_height or not inner_width:
        raise InputError(f"an image of {height} x {width} pixels is too narrow to be resized")
    inner = Image.fromarray(image).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    padded = np.zeros((size, size, 3), np.uint8)
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    padded[top : top + inner_height, left : left + inner_width] = np.asarray(inner)
    return padded
