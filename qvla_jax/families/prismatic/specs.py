"""A policy's inputs, without a policy: shapes of model inputs, and a synthetic observation."""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network import ModelInputs

# Side of a camera image in LIBERO, the input of the reference's image pipeline.
_CAMERA_PIXELS: Final = 256


def inputs_spec(config: OpenVLAConfig, *, batch_size: int = 1) -> ModelInputs:
    """Shapes and dtypes of prepared inputs, for `jax.eval_shape`, lowering and compiling ahead.

    Args:
        config: the policy's architecture.
        batch_size: observations in a batch.

    Returns:
        `ModelInputs` with a `jax.ShapeDtypeStruct` in place of each array; proprio is None if the
        policy takes none, and so are action tokens. Prompts have the first length that they are
        padded to.
    """

    def spec(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    size = config.image_size
    return ModelInputs(
        images=spec((config.num_images, size, size, 3), jnp.uint8),
        input_ids=spec((config.max_prompt_tokens,), jnp.int32),
        prompt_length=spec((), jnp.int32),
        proprio=spec((config.proprio_dim,), jnp.float32) if config.proprio_dim else None,
    )


def fake_observation(config: OpenVLAConfig, *, seed: int = 0) -> dict[str, Any]:
    """An observation of noise with exactly the entries that `Policy.infer` requires.

    Args:
        config: the policy's architecture.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    side = _CAMERA_PIXELS if config.image_chain == "openvla" else config.image_size
    observation: dict[str, Any] = {
        camera: rng.integers(0, 256, (side, side, 3), np.uint8) for camera in config.camera_keys
    }
    if config.proprio_dim:
        observation["state"] = rng.uniform(-1.0, 1.0, config.proprio_dim).astype(np.float32)
    return {**observation, "instruction": "pick up the black bowl and place it on the plate"}
