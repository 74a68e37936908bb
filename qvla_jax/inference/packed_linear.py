"""The linear layer of packed policies."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.fused_attention import fuse_attention
from qvla_jax.models.surgery import named_modules, replace_modules
from qvla_jax.quantization.rotation import rotate


class PackedArrays(nnx.Variable):
    """Words, scales, index and bias of a packed layer: constants, not parameters."""


class PackedLinear(nnx.Module):
    """Replaces a `Linear` and multiplies by its packed weight: [..., k] -> [..., c].

    Patch embeddings are linear layers over flattened patches, so they are packed in the same way.
    The weight is held only in the arrangement of the platform's kernel.

    Layers that take the same input hold the same joined weight (see `joint_layers`). Each computes
    the whole product and takes its outputs; under `jit` these products are one, because XLA merges
    equal calls with equal operands.
    """

    def __init__(
        self,
        weight: kernels.PackedWeight,
        *,
        activation_bits: int = 16,
        input_scale: Float[np.ndarray, " k"] | None = None,
        rotated: bool = False,
        implementation: str | None = None,
        joined: PackedArrays | None = None,
        start: int = 0,
    ):
        """Arranges the weight for the kernel and puts it on the default device.

        Args:
            weight: canonical weight.
            activation_bits: of `kernels.mixed_matmul`.
            input_scale: factor of each input, applied before rounding; None: 1.
            rotated: whether inputs are rotated (quantization.rotation) after scaling.
            implementation: None takes the best for the platform.
            joined: a joined weight to hold instead, which contains this one ...
            start: ... starting at this output.
        """
        self.arrays = arranged(weight, implementation) if joined is None else joined
        self.activation_bits = activation_bits
        self.input_scale = (
            None
            if input_scale is None
            else PackedArrays(jnp.asarray(input_scale.astype(ml_dtypes.bfloat16)))
        )
        self.rotated = rotated
        self.start, self.stop = start, start + weight.shape[0]
        self.has_index = weight.index is not None

    def __call__(self, inputs: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> inputs w_hat^T + bias [..., c], in the dtype of the inputs."""
        if self.input_scale is not None:
            inputs = scale_inputs(inputs, self.input_scale.get_value())
        if self.rotated:
            inputs = rotate(inputs).astype(inputs.dtype)
        y = kernels.mixed_matmul(inputs, self.arrays.get_value(), self.activation_bits)
        return y[..., self.start : self.stop]

    @property
    def inputs(self) -> kernels.LayerInputs:
        """What happens to the inputs before the product, on the host."""
        scale = None if self.input_scale is None else jax.device_get(self.input_scale.get_value())
        return kernels.LayerInputs(self.activation_bits, scale, self.rotated)

    @property
    def weight(self) -> kernels.PackedWeight:
        """The canonical weight of this layer alone, on the host."""
        # Not on the device: each mix of widths has its own shapes, for which JAX would compile.
        held = kernels.canonical(jax.device_get(self.arrays.get_value()))
        if self.stop - self.start == held.shape[0]:
            return held
        return kernels.part(held, self.start, self.stop, index=self.has_index)


def scale_inputs(x: Float[Array, "*b k"], scale: Float[Array, " k"]) -> Float[Array, "*b k"]:
    """Every input times its factor, in float32, in the dtype of the inputs."""
    factor = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def arranged(weight: kernels.PackedWeight, implementation: str | None = None) -> PackedArrays:
    """The weight in the kernel's arrangement, on the default device."""
    prepared = kernels.prepare(weight, implementation)
    # A rearranged weight is not moved. The reference uses the weight itself, which may be mapped
    # from a file.
    place = jnp.array if prepared is weight else jax.device_put
    return PackedArrays(jax.tree.map(place, prepared))


def joint_layers(
    weights: Sequence[kernels.PackedWeight],
    *,
    activation_bits: int = 16,
    rotated: bool = False,
    implementation: str | None = None,
) -> list[PackedLinear]:
    """Layers that take the same input and hold one joined weight; see `PackedLinear`."""
    joined = arranged(kernels.join(weights), implementation)
    starts = itertools.accumulate((weight.shape[0] for weight in weights), initial=0)
    return [
        PackedLinear(
            weight, activation_bits=activation_bits, rotated=rotated, joined=joined, start=start
        )
        for weight, start in zip(weights, starts, strict=False)
    ]


def replace_by_packed(
    model: nnx.Module,
    weights: Iterable[tuple[str, kernels.PackedWeight]],
    inputs: Mapping[str, kernels.LayerInputs] | None = None,
    *,
    same_input: Sequence[tuple[str, ...]],
) -> None:
    """Replaces linear layers by packed ones, in place, and attention by the kernel's.

    Args:
        model: any NNX module.
        weights: dotted path and weight of each layer, those of one module one after the other.
        inputs: what layers do to their inputs, by path; other layers use them unchanged.
        same_input: names of layers of one module that take the same input, which are joined if
            possible; those of the policy's layout.
    """
    given = inputs or {}
    for parent, group in itertools.groupby(weights, lambda item: item[0].rpartition(".")[0]):
        found = {name.rpartition(".")[2]: weight for name, weight in group}
        prefix = f"{parent}." if parent else ""
        own = {name: given.get(prefix + name, kernels.LayerInputs()) for name in found}
        layers: dict[str, PackedLinear] = {}
        for names in same_input:
            together = [found[name] for name in names if name in found]
            if len(together) < len(names) or kernels.cannot_join(together) is not None:
                continue
            same = {(own[name].activation_bits, own[name].rotated) for name in names}
            if len(same) == 1 and all(own[name].scale is None for name in names):
                bits, rotated = same.pop()
                joint = joint_layers(together, activation_bits=bits, rotated=rotated)
                layers |= zip(names, joint, strict=True)
        for name in found.keys() - layers.keys():
            layers[name] = PackedLinear(
                found[name],
                activation_bits=own[name].activation_bits,
                input_scale=own[name].scale,
                rotated=own[name].rotated,
            )
        replace_modules(model, {prefix + name: layer for name, layer in layers.items()})
    fuse_attention(model)


def packed_layers(model: nnx.Module) -> dict[str, PackedLinear]:
    """Packed layers by dotted path, in the model's order."""
    return named_modules(model, PackedLinear)
