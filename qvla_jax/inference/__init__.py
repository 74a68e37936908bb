"""From observations to action chunks."""

from qvla_jax.inference.policy import Policy, load_policy, random_policy

__all__ = ["Policy", "load_policy", "random_policy"]
