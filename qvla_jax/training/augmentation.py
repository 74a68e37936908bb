"""Augmentations, run on the device inside the training step."""

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float, UInt8


def random_shift(
    key: jax.Array, images: UInt8[Array, "b v H W 3"], *, pixels: int
) -> UInt8[Array, "b v H W 3"]:
    """Random crops of the edge-padded images: shifts of up to `pixels` in each direction.

    Every camera of every observation is shifted independently.
    """
    b, v, height, width, _ = images.shape
    margin = ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
    padded = jnp.pad(images, margin, mode="edge")
    offsets = jax.random.randint(key, (b, v, 2), 0, 2 * pixels + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, 3))

    return jax.vmap(jax.vmap(crop))(padded, offsets)


def proprio_noise(
    key: jax.Array, proprio: Float[Array, "b p"], *, scale: float
) -> Float[Array, "b p"]:
    """Adds Gaussian noise to normalized proprio, so the policy does not rely on its last digits."""
    return proprio + scale * jax.random.normal(key, proprio.shape, proprio.dtype)
