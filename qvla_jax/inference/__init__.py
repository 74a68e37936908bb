"""From observations to action chunks."""

from qvla_jax.inference.policy import Policy, import_policy, load_policy, random_policy

__all__ = ["Policy", "import_policy", "load_policy", "random_policy"]
