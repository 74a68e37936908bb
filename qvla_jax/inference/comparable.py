"""Policies of one origin in one form, so that one compiled program runs them all."""

import jax.numpy as jnp
from flax import nnx

from qvla_jax.inference.policy import Policy
from qvla_jax.models.surgery import named_modules


def comparable(policy: Policy) -> Policy:
    """The same policy, all of whose linear layers have a bias: zeros where there was none.

    The bias correction gives a bias to those layers alone that it corrects. XLA compiles for the
    structure of a model, so that every other choice of layers would be another program. Biases of
    zero leave every product as it is.

    Args:
        policy: in full precision, or quantized with `packed=False`; packed layers stay as they are.
    """
    model = nnx.merge(*nnx.split(policy.model))
    for linear in named_modules(model, nnx.Linear).values():
        if linear.bias is None:
            linear.bias = nnx.Param(jnp.zeros(linear.kernel.shape[1], jnp.float32))
            linear.use_bias = True
    return policy.replace(model=model)
