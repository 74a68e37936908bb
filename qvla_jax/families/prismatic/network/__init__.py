"""Flax NNX modules of the Prismatic VLAs; names follow the public checkpoints."""

from qvla_jax.families.prismatic.network.assembly import abstract_model, make_model
from qvla_jax.families.prismatic.network.openvla import ModelInputs, OpenVLA, OpenVLAOFT, Prismatic
from qvla_jax.families.prismatic.network.univla import UniVLA

__all__ = [
    "ModelInputs",
    "OpenVLA",
    "OpenVLAOFT",
    "Prismatic",
    "UniVLA",
    "abstract_model",
    "make_model",
]
