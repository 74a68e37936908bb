"""From observations to action chunks."""

from qvla_jax.inference.importing import import_policy
from qvla_jax.inference.loading import load_policy, random_policy
from qvla_jax.inference.policy import Policy

__all__ = ["Policy", "import_policy", "load_policy", "random_policy"]
