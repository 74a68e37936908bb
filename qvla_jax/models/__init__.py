"""Flax NNX modules of the Prismatic VLAs; names follow the public checkpoints."""

from qvla_jax.models.assembly import abstract_model, make_model
from qvla_jax.models.openvla import ModelInputs, OpenVLA, OpenVLAOFT, Prismatic
from qvla_jax.models.surgery import get_module, named_modules, replace_modules
from qvla_jax.models.univla import UniVLA

__all__ = [
    "ModelInputs",
    "OpenVLA",
    "OpenVLAOFT",
    "Prismatic",
    "UniVLA",
    "abstract_model",
    "get_module",
    "make_model",
    "named_modules",
    "replace_modules",
]
