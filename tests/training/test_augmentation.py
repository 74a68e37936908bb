import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.training.augmentation import proprio_noise, random_shift


def test_shifted_images_are_crops_of_the_edge_padded_ones():
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 12, 10, 3), np.uint8)
    shifted = np.asarray(random_shift(jax.random.key(0), jnp.asarray(images), pixels=2))
    seen = set()
    for i in range(6):
        for v in range(2):
            padded = np.pad(images[i, v], ((2, 2), (2, 2), (0, 0)), mode="edge")
            offsets = [
                (y, x)
                for y in range(5)
                for x in range(5)
                if np.array_equal(padded[y : y + 12, x : x + 10], shifted[i, v])
            ]
            assert offsets
            seen.add(offsets[0])
    assert len(seen) > 4, "cameras and observations are shifted on their own"


def test_no_shift_leaves_images_alone():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(random_shift(jax.random.key(0), images, pixels=0), images)


def test_proprio_noise_has_the_scale_asked_for():
    noise = proprio_noise(jax.random.key(0), jnp.zeros((2000, 8)), scale=0.02)
    np.testing.assert_allclose(np.std(np.asarray(noise)), 0.02, rtol=0.05)
