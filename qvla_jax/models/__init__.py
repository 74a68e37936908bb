"""Flax NNX modules of the Prismatic VLAs; names follow the public checkpoints."""

from qvla_jax.models.openvla import (
    ModelInputs,
    OpenVLA,
    OpenVLAOFT,
    Prismatic,
    abstract_model,
    make_model,
)
from qvla_jax.models.surgery import get_module, named_modules, replace_modules

__all__ = [
    "ModelInputs",
    "OpenVLA",
    "OpenVLAOFT",
    "Prismatic",
    "abstract_model",
    "get_module",
    "make_model",
    "named_modules",
    "replace_modules",
]
