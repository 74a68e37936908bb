"""Reading and writing weights under the names of the public checkpoints."""

from qvla_jax.checkpoints.weights import load_weights, public_tensors, save_weights

__all__ = ["load_weights", "public_tensors", "save_weights"]
