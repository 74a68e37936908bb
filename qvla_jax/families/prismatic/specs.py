"""A policy's inputs, without a policy: shapes of model inputs, and entries of observations."""

from typing import Any, Final

import jax
import jax.numpy as jnp

from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network import ModelInputs

# Side of the pictures that OpenVLA-OFT's evaluation in LIBERO takes; small policies are trained on
# pictures of their towers' size.
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


def observation_spec(config: OpenVLAConfig) -> ObservationSpec:
    """What an observation of the policy holds."""
    texts = ("instruction",) if config.latent_action is None else ("instruction", "history")
    return ObservationSpec(
        cameras=config.camera_keys,
        state_dim=config.proprio_dim,
        texts=texts,
        optional=frozenset({"history"}),
        image_size=_CAMERA_PIXELS if config.image_chain == "openvla" else config.image_size,
    )
