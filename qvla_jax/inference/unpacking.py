"""The values of a packed policy in ordinary layers."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import AnyArray, Array, Float
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers, scale_inputs
from qvla_jax.inference.policy import Policy
from qvla_jax.kernels.activations import largest_code, round_to
from qvla_jax.models.linear import Embed
from qvla_jax.models.surgery import named_modules, replace_modules
from qvla_jax.quantization.rotation import rotate, rotate_back


class RoundingLinear(nnx.Module):
    """A linear layer in float32 that scales, rotates and rounds inputs like a `PackedLinear`.

    Products of rounded inputs and grid values are those of integer arithmetic, up to the rounding
    of float32: int4 times int4 has no product in XLA for CPUs.
    """

    def __init__(
        self,
        kernel: Float[Array, "k c"],
        bias: Float[Array, " c"],
        scale: Float[Array, " k"],
        activation_bits: int,
        *,
        rotated: bool = False,
    ):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)
        self.scale = nnx.Param(scale)
        # An array, so that one compiled program serves all bits and fingerprints distinguish them.
        self.largest_code = nnx.Param(jnp.float32(largest_code(activation_bits)))
        self.rotated = rotated

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> rounded inputs kernel + bias [..., c], in the dtype of the inputs."""
        scaled = scale_inputs(x, self.scale[...])
        if self.rotated:
            scaled = rotate(scaled).astype(x.dtype)
        rounded = round_to(scaled, self.largest_code[...])
        # Plain matrices: see `models.linear.Linear`.
        y = jnp.matmul(rounded.reshape(-1, x.shape[-1]), self.kernel[...]) + self.bias[...][None]
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def folded(
    kernel: Float[Array, "k c"], scale: Float[AnyArray, " k"] | None, *, rotated: bool
) -> Float[Array, "k c"]:
    """The kernel for inputs as they come, of one for scaled and rotated inputs, in float32."""
    if rotated:
        kernel = rotate_back(kernel.T).T
    return kernel if scale is None else kernel * jnp.asarray(scale).astype(jnp.float32)[:, None]


def unpacked(policy: Policy, packed: Policy, *, rounding: bool = False) -> Policy:
    """The full-precision policy with the values of a packed one, in float32.

    Two compiled programs serve all such policies, one of them those that round activations
    anywhere, while packed layers of other shapes are recompiled; useful for comparing many
    policies.

    Args:
        policy: the full-precision policy that `packed` was made from.
        packed: the packed policy.
        rounding: whether all its layers become a `RoundingLinear`, even if none rounds.

    Raises:
        InputError: a packed layer is not a linear layer of `policy`.
    """
    model = nnx.merge(*nnx.split(policy.model))
    linears = named_modules(model, nnx.Linear)
    replaced: dict[str, nnx.Module] = {}
    layers = packed_layers(packed.model)
    rounds = rounding or any(layer.activation_bits != 16 for layer in layers.values())
    for path, layer in layers.items():
        weight, inputs = layer.weight, layer.inputs
        linear = linears.get(path)
        if linear is None or linear.kernel.shape[::-1] != weight.shape:
            raise InputError(f"{path}: the packed policy was not made of {policy.config.name}")
        c, k = weight.shape
        kernel = kernels.dequantize(weight).T
        scale = jnp.ones(k) if inputs.scale is None else jnp.asarray(inputs.scale, jnp.float32)
        bias = None if weight.bias is None else jnp.asarray(weight.bias).astype(jnp.float32)
        if rounds:
            bias = jnp.zeros(c) if bias is None else bias
            replaced[path] = RoundingLinear(
                kernel, bias, scale, inputs.activation_bits, rotated=inputs.rotated
            )
            continue
        linear.kernel = nnx.Param(folded(kernel, inputs.scale, rotated=inputs.rotated))
        if bias is not None:
            linear.bias, linear.use_bias = nnx.Param(bias), True
    embeds = named_modules(model, Embed)
    for path, table in packed_embeddings(packed.model).items():
        if path not in embeds or embeds[path].embedding.shape != table.weight.shape:
            raise InputError(f"{path}: the packed policy was not made of {policy.config.name}")
        embeds[path].embedding = nnx.Param(kernels.dequantize(table.weight))
    replace_modules(model, replaced)
    return dataclasses.replace(policy, model=model, quantization=packed.quantization)
