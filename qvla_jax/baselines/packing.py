"""Rows that a method quantized -> a policy that runs from packed weights."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from qvla_jax import kernels
from qvla_jax.baselines.numerics import QuantizedRows
from qvla_jax.baselines.settings import Setting
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.policy import Policy
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import LayerRules, quantizable_layers, weight_rows


def packed_policy(
    policy: Policy,
    index: ChannelIndex,
    rows: Iterable[tuple[LayerInfo, QuantizedRows]],
    setting: Setting,
    *,
    rules: LayerRules,
    calibration: str | None,
) -> Policy:
    """A copy of the policy whose quantized layers hold these codes and scales.

    Args:
        policy: the full-precision policy.
        index: its quantized layers.
        rows: for each of them, in the index's order.
        setting: what made them.
        rules: that `index` was made by.
        calibration: hash of the calibration set; None where none was used.
    """
    model = nnx.merge(*nnx.split(policy.model))
    linears = quantizable_layers(model, rules)
    assert tuple(linears) == index.paths
    weights = (
        (layer.path, _packed(linears[layer.path], layer, own, setting)) for layer, own in rows
    )
    replace_by_packed(model, weights)
    return dataclasses.replace(
        policy, model=model, quantization=description(policy, setting, calibration)
    )


def description(policy: Policy, setting: Setting, calibration: str | None) -> dict[str, Any]:
    """What the file's header says about the quantization."""
    return {
        "method": setting.name,
        "policy fingerprint": policy.fingerprint,
        "calibration hash": calibration,
    }


def _packed(
    linear: nnx.Linear, layer: LayerInfo, rows: QuantizedRows, setting: Setting
) -> kernels.PackedWeight:
    source = "bfloat16" if layer.source_bytes == 2 else "float32"
    bias = None if linear.bias is None else np.asarray(linear.bias[...])
    return kernels.pack(
        weight_rows(linear),
        np.full(layer.out_features, int(setting.bits)),
        setting.group if rows.scales.shape[1] > 1 else None,
        grid="rtn",
        codes=rows.codes,
        scales=rows.scales,
        bias=None if bias is None else bias.astype(kernels.SOURCE_DTYPES[source]),
        source_dtype=source,
        index=False,
    )
