"""Behaviour cloning of small policies."""

from qvla_jax.training.behaviour_cloning import TrainConfig, train

__all__ = ["TrainConfig", "train"]
