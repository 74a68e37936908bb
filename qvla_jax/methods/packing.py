"""Builds a policy that runs from packed weights out of the rows that a method quantized."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from qvla_jax import kernels
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.packing import pack_layer
from qvla_jax.inference.policy import Policy
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.layers import LayerRules, quantizable_layers, weight_rows
from qvla_jax.quantization.rows import QuantizedRows


def packed_policy(
    policy: Policy,
    index: ChannelIndex,
    rows: Iterable[QuantizedRows],
    setting: Setting,
    *,
    rules: LayerRules,
    made_with: Mapping[str, Any],
) -> Policy:
    """A copy of the policy whose quantized layers hold these codes and scales.

    Args:
        policy: the full-precision policy.
        index: its quantized layers.
        rows: those of each layer, in the index's order.
        setting: the method and its bits; its activation bits apply to every layer.
        rules: the rules that `index` was made with.
        made_with: entries of the file's header in addition to the method's name and the policy.
    """
    model = nnx.merge(*nnx.split(policy.model))
    linears = quantizable_layers(model, rules)
    assert tuple(linears) == index.paths
    weights, inputs = {}, {}
    for layer, own in zip(index.layers, rows, strict=True):
        linear = linears[layer.path]
        bias = None if linear.bias is None else linear.bias[...]
        weights[layer.path] = pack_layer(layer, own, weight_rows(linear), bias, index=False)
        inputs[layer.path] = kernels.LayerInputs(int(setting.activation_bits), own.input_scale)
    replace_by_packed(model, weights.items(), inputs, same_input=policy.layout.same_input)
    return dataclasses.replace(
        policy, model=model, quantization=described(policy, setting, made_with)
    )


def described(policy: Policy, setting: Setting, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What the file's header says about the quantization."""
    return {"method": setting.name, "policy fingerprint": policy.fingerprint, **made_with}
