"""The network of pi0 and pi0.5 in Flax NNX; module paths follow the public names."""

from typing import Final

from qvla_jax.families.openpi.network.pi0 import (
    Conditioning,
    FlowMatching,
    Pi0,
    Pi0Inputs,
    Pi05,
    Prefix,
    abstract_model,
    make_model,
    unread_modules,
)

# Layers of one module that take the same input.
SAME_INPUT: Final = (
    ("query", "key", "value"),
    ("q_einsum", "k_einsum", "v_einsum"),
    ("q_einsum_1", "k_einsum_1", "v_einsum_1"),
    ("gate", "up"),
)

__all__ = [
    "SAME_INPUT",
    "Conditioning",
    "FlowMatching",
    "Pi0",
    "Pi0Inputs",
    "Pi05",
    "Prefix",
    "abstract_model",
    "make_model",
    "unread_modules",
]
