"""From a configuration to its network."""

from typing import Any

import jax
from flax import nnx

from qvla_jax.config import OpenVLAConfig
from qvla_jax.models.openvla import OpenVLA, OpenVLAOFT, Prismatic
from qvla_jax.models.univla import UniVLA

_BY_DECODING = {"l1": OpenVLAOFT, "tokens": OpenVLA, "latents": UniVLA}


def make_model(config: OpenVLAConfig, *, rngs: nnx.Rngs) -> Prismatic:
    """The architecture that a configuration describes, with random weights."""
    return _BY_DECODING[config.decoding](config, rngs=rngs)


def abstract_model(config: OpenVLAConfig, *, dtype: Any = None) -> Prismatic:
    """The architecture with shapes and dtypes in place of arrays: costs no memory, cannot run.

    Args:
        config: the architecture.
        dtype: of all parameters; float32 if left out. Arithmetic stays in float32.
    """
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    if dtype is not None:
        cast = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.state(model, nnx.Param)
        )
        nnx.update(model, cast)
    return model
