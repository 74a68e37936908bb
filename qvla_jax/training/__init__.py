"""Behavior cloning of small policies."""

from qvla_jax.training.behaviour_cloning import train
from qvla_jax.training.config import TrainConfig

__all__ = ["TrainConfig", "train"]
