"""Builds the network that a configuration describes."""

from typing import Any

from flax import nnx

from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network.openvla import OpenVLA, OpenVLAOFT, Prismatic
from qvla_jax.families.prismatic.network.univla import UniVLA
from qvla_jax.models.abstract import abstract

_BY_DECODING = {"l1": OpenVLAOFT, "tokens": OpenVLA, "latents": UniVLA}


def make_model(config: OpenVLAConfig, *, rngs: nnx.Rngs) -> Prismatic:
    """The architecture that a configuration describes, with random weights."""
    return _BY_DECODING[config.decoding](config, rngs=rngs)


def abstract_model(config: OpenVLAConfig, *, dtype: Any = None) -> Prismatic:
    """The architecture with shapes and dtypes in place of arrays: costs no memory, cannot run.

    Args:
        config: the architecture.
        dtype: dtype of all parameters; float32 by default. Arithmetic stays in float32.
    """
    return abstract(make_model, config, dtype=dtype)
