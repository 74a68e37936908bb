"""Converts camera images to a tower's input, as in OpenVLA-OFT's evaluation in LIBERO.

JPEG round trip, lanczos3 with antialiasing to 224 pixels, a crop of the central 90 % of the area if
the policy was trained with random crops, then PIL's bicubic to the tower's size (a no-op at 224).
The reference uses TensorFlow for the first three steps, which are reimplemented here; its JPEG
decoder uses another inverse DCT than PIL's, with differences of up to 10 gray levels in single
pixels.
"""

import functools
import io

import numpy as np
from PIL import Image

from qvla_jax.array_typing import Float, UInt8

# Side of the images that the reference's processor receives.
MODEL_IMAGE_SIZE = 224
_CROP_AREA = 0.9


def reference_chain(
    image: UInt8[np.ndarray, "H W 3"], *, center_crop: bool
) -> UInt8[np.ndarray, "224 224 3"]:
    """A raw camera image -> the input of the reference's processor."""
    image = resize_lanczos3(jpeg_round_trip(image), MODEL_IMAGE_SIZE)
    return crop_center(image) if center_crop else image


def jpeg_round_trip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Encodes and decodes with TensorFlow's defaults: quality 95, 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


def resize_lanczos3(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """`tf.image.resize(method="lanczos3", antialias=True)`, rounded and clipped."""
    rows = _lanczos3(image.shape[0], size)
    columns = _lanczos3(image.shape[1], size)
    resized = np.einsum("yi,xj,ijc->yxc", rows, columns, image.astype(np.float32), optimize=True)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=16)  # cameras have few sizes, clients of a server any number
def _lanczos3(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Weights of every source pixel in every target pixel; rows sum to 1."""
    scale = source / target
    width = max(scale, 1.0)
    centers = (np.arange(target) + 0.5) * scale - 0.5
    distance = (np.arange(source)[None] - centers[:, None]) / width
    weights = np.where(np.abs(distance) < 3.0, np.sinc(distance) * np.sinc(distance / 3.0), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def crop_center(image: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The central 90 % of the area, back at the same size (`tf.image.crop_and_resize`)."""
    rows, columns = (_crop(n) for n in image.shape[:2])
    pixels = image.astype(np.float32) / 255.0
    cropped = np.einsum("yi,xj,ijc->yxc", rows, columns, pixels, optimize=True)
    # TensorFlow's conversion back to uint8: scaled by 255.5 and truncated.
    return np.clip(np.clip(cropped, 0.0, 1.0) * 255.5, 0.0, 255.0).astype(np.uint8)


@functools.cache
def _crop(size: int) -> Float[np.ndarray, "size size"]:
    """Bilinear weights of the crop along one axis; the first and last samples are on its edges."""
    side = np.sqrt(_CROP_AREA)
    positions = ((1.0 - side) / 2.0 + side * np.arange(size) / (size - 1)) * (size - 1)
    lower = np.clip(np.floor(positions).astype(int), 0, size - 2)
    fraction = positions - lower
    weights = np.zeros((size, size), np.float32)
    weights[np.arange(size), lower] = 1.0 - fraction
    weights[np.arange(size), lower + 1] += fraction
    return weights


def resize_bicubic(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """PIL's bicubic, as in the public image processor; a no-op if the size fits."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
