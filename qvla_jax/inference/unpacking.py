"""The values of a packed policy in ordinary layers."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.policy import Policy
from qvla_jax.models.surgery import named_modules


def unpacked(policy: Policy, packed: Policy) -> Policy:
    """The full-precision policy with the values of a packed one, in float32.

    One compiled program serves all policies made so, where packed layers of other shapes are
    compiled anew: for comparing many.

    Args:
        policy: the full-precision policy that `packed` was made of.
        packed: the packed policy.

    Raises:
        InputError: a packed layer is no linear layer of `policy`.
    """
    model = nnx.merge(*nnx.split(policy.model))
    linears = named_modules(model, nnx.Linear)
    for path, layer in packed_layers(packed.model).items():
        weight = layer.weight
        linear = linears.get(path)
        if linear is None or linear.kernel.shape[::-1] != weight.shape:
            raise InputError(f"{path}: the packed policy was not made of {policy.config.name}")
        linear.kernel = nnx.Param(kernels.dequantize(jax.tree.map(jnp.asarray, weight)).T)
        if weight.bias is not None:
            bias = jnp.asarray(weight.bias).astype(jnp.float32)
            linear.bias, linear.use_bias = nnx.Param(bias), True
    return dataclasses.replace(policy, model=model, quantization=packed.quantization)
