"""Flax NNX modules of the Prismatic VLAs; names follow the public checkpoints."""

from qvla_jax.models.openvla import ModelInputs, OpenVLA
from qvla_jax.models.surgery import get_module, named_modules, replace_modules

__all__ = ["ModelInputs", "OpenVLA", "get_module", "named_modules", "replace_modules"]
