"""Builds a policy that runs from packed weights out of the rows that a published method rounded."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.packing import pack_layer
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.moments import InputMoments
from qvla_jax.methods.numerics import nearest
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.layers import quantizable_layers, weight_rows
from qvla_jax.quantization.rows import QuantizedRows

# Rows [c, k], the moments of their inputs, bits and group -> codes and scales.
RowsOf: TypeAlias = Callable[[Float[Array, "c k"], InputMoments, int, int | None], QuantizedRows]


def round_to_nearest(measured: Measurements, setting: Setting) -> Policy:
    """Round to nearest (qwix's PTQ); reads no frame."""
    bits, group = int(setting.bits), setting.group
    layers = quantizable_layers(measured.policy.model, measured.rules)
    rows = (nearest(layer.kernel[...].T, bits, group) for layer in layers.values())
    return packed_policy(measured, setting, rows, calibrated=False)


def layer_by_layer(measured: Measurements, setting: Setting, rows_of: RowsOf) -> Policy:
    """The packed policy of a method that needs nothing but one layer and its input moments.

    Layers that no forward pass reaches have none, and are rounded to nearest.
    """
    bits, group = int(setting.bits), setting.group
    layers = quantizable_layers(measured.policy.model, measured.rules)

    def rows() -> Iterator[QuantizedRows]:
        for done, (path, layer) in enumerate(layers.items()):
            measured.progress(setting.name, done, len(layers))
            weight, moments = layer.kernel[...].T, measured.moments.get(path)
            if moments is None:
                yield nearest(weight, bits, group)
            else:
                yield rows_of(weight, moments, bits, group)
        measured.progress(setting.name, len(layers), len(layers))

    return packed_policy(measured, setting, rows())


def packed_policy(
    measured: Measurements,
    setting: Setting,
    rows: Iterable[QuantizedRows],
    *,
    sources: Iterable[Float[np.ndarray, "c k"]] | None = None,
    calibrated: bool = True,
    details: Mapping[str, Any] | None = None,
) -> Policy:
    """A copy of the policy whose quantized layers hold these codes and scales.

    Args:
        measured: the full-precision policy, and its quantized layers.
        setting: the method and its bits; its activation bits apply to every layer.
        rows: those of each layer, in the order of `policy_index`.
        sources: what rows of 16 bits keep, likewise; None: the policy's weights.
        calibrated: whether the rows depend on the calibration set.
        details: further entries of the file's header.
    """
    policy = measured.policy
    index = policy_index(policy, measured.rules)
    model = nnx.merge(*nnx.split(policy.model))
    linears = quantizable_layers(model, measured.rules)
    weights, inputs = {}, {}
    if sources is None:
        sources = map(weight_rows, linears.values())
    for layer, own, source in zip(index.layers, rows, sources, strict=True):
        linear = linears[layer.path]
        bias = None if linear.bias is None else linear.bias[...]
        weights[layer.path] = pack_layer(layer, own, source, bias, index=False)
        inputs[layer.path] = kernels.LayerInputs(int(setting.activation_bits), own.input_scale)
    replace_by_packed(model, weights.items(), inputs, same_input=policy.layout.same_input)
    header = described(measured, setting, calibrated=calibrated) | dict(details or {})
    return dataclasses.replace(policy, model=model, quantization=header)


def described(
    measured: Measurements, setting: Setting, *, calibrated: bool = True
) -> dict[str, Any]:
    """What the file's header says about the quantization."""
    return {
        "method": setting.name,
        "policy fingerprint": measured.policy.fingerprint,
        "calibration hash": measured.calibration.manifest["sha256"] if calibrated else None,
    }
