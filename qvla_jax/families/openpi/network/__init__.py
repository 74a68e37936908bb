"""The network of pi0 and pi0.5 in Flax NNX; module paths follow the public names."""

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

__all__ = [
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
