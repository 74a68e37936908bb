"""The linear layer of packed policies."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float
from qvla_jax.models.surgery import named_modules


class PackedArrays(nnx.Variable):
    """Words, scales, index and bias of a packed layer: constants, no parameters."""


class PackedLinear(nnx.Module):
    """Stands in for a `Linear` and multiplies by its packed weight: [..., k] -> [..., c].

    Patch embeddings are linear layers over flattened patches, so they are packed by it too. The
    weight is held in the arrangement of the platform's kernel and in no other.
    """

    def __init__(
        self,
        weight: kernels.PackedWeight,
        *,
        activation_bits: int = 16,
        implementation: str | None = None,
    ):
        """Arranges the weight for the kernel and puts it on the default device.

        Args:
            weight: canonical weight.
            activation_bits: of `kernels.mixed_matmul`.
            implementation: None takes the best for the platform.
        """
        prepared = kernels.prepare(weight, implementation)
        self.arrays = PackedArrays(jax.tree.map(jnp.asarray, prepared))
        self.activation_bits = activation_bits

    def __call__(self, inputs: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> inputs w_hat^T + bias [..., c], in the dtype of the inputs."""
        return kernels.mixed_matmul(inputs, self.arrays.get_value(), self.activation_bits)

    @property
    def weight(self) -> kernels.PackedWeight:
        """The canonical weight, on the host."""
        return jax.device_get(kernels.canonical(self.arrays.get_value()))


def packed_layers(model: nnx.Module) -> dict[str, PackedLinear]:
    """Packed layers by dotted path, in the model's order."""
    return named_modules(model, PackedLinear)
