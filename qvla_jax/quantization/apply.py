"""Quantizing a policy: module surgery that puts weights on their grids and corrects biases."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Float, Int
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.quantization.bias import corrected_bias
from qvla_jax.quantization.grid import BITS, SOURCE, Grid, on_mixed_grid
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import (
    DEFAULT_RULES,
    LayerRules,
    channel_index,
    quantizable_layers,
)


@dataclasses.dataclass(frozen=True)
class QuantizedPolicy(Policy):
    """A policy whose quantized layers hold weights on their grids.

    Invariants: `bits` has one entry for each channel of `index`; a layer all of whose channels
    have 16 bits is the source layer, untouched.
    """

    index: ChannelIndex
    bits: Int[np.ndarray, " C"]
    bias_corrected: bool
    # The weights have the values of their grids but are held, and multiplied, in float32.
    simulated: bool = True

    def save(self, path: str | Path, *, dtype: Any = None) -> NoReturn:
        """Refuses: a simulated policy holds unpacked weights.

        Raises:
            InputError: always; save the bits and quantize the source policy again.
        """
        del dtype
        raise InputError(
            f"{path}: a simulated quantized policy is not saved, its weights are not packed; save "
            "the bits and apply them to the source policy again"
        )


def policy_index(policy: Policy, rules: LayerRules = DEFAULT_RULES) -> ChannelIndex:
    """The policy's quantized layers and the order of their channels.

    Raises:
        InputError: a weight is NaN or infinite, or a rule matches nothing.
    """
    return channel_index(quantizable_layers(policy.model, rules))


def quantize(
    policy: Policy,
    bits: Int[np.ndarray, " C"],
    *,
    means: Mapping[str, Float[np.ndarray, " k"]] | None = None,
    bias_correction: bool | None = None,
    grid: Grid = "fitted",
    rules: LayerRules = DEFAULT_RULES,
) -> QuantizedPolicy:
    """A copy of the policy with every channel at its bit-width; the source is left as it is.

    16-bit channels keep their weights bit for bit. Execution is simulated for now: the values are
    those of the grids, in float32.

    Args:
        policy: the full-precision policy.
        bits: 0, 2, 3, 4, 8 or 16 for each channel, in the order of `policy_index(policy)`, which is
            that of a sensitivity table.
        means: E[x] of each layer's inputs over calibration data, for the bias correction. Bits that
            come from `SensitivityTable.bits_of` bring them along.
        bias_correction: whether to correct biases; None does so if the means are known.
        grid: "fitted" (ours, that of a sensitivity table) or "rtn" (plain rounding to nearest).
        rules: which layers are quantized.

    Raises:
        InputError: a weight is NaN or infinite (named by layer and channel), `bits` has the wrong
            length or holds a width that is no option, or means are needed and missing or do not
            fit a layer.
    """
    if isinstance(policy, QuantizedPolicy):
        raise InputError("the policy is quantized already; quantize the full-precision one")
    layers = quantizable_layers(policy.model, rules)
    index = channel_index(layers)
    chosen = index.check_bits(bits, BITS)
    means = getattr(bits, "means", None) if means is None else means
    correct = (means is not None) if bias_correction is None else bias_correction
    if correct:
        _check_means(index, means)
    # A copy with Variables of its own; arrays that do not change are shared.
    model = nnx.merge(*nnx.split(policy.model))
    copies = quantizable_layers(model, rules)
    for layer, rows in index.items():
        if np.any(chosen[rows] != SOURCE):
            mean = means[layer.path] if correct and means is not None else None
            _quantize_layer(copies[layer.path], layer, chosen[rows], mean, grid)
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(Policy)}
    return QuantizedPolicy(
        **{**fields, "model": model}, index=index, bits=chosen, bias_corrected=correct
    )


def quantize_uniform(
    policy: Policy, bits: int, *, rules: LayerRules = DEFAULT_RULES
) -> QuantizedPolicy:
    """Round to nearest at one bit-width everywhere, without bias correction: the baseline."""
    count = len(policy_index(policy, rules))
    return quantize(policy, np.full(count, bits), bias_correction=False, grid="rtn", rules=rules)


def _quantize_layer(
    linear: nnx.Linear, info: LayerInfo, bits: np.ndarray, mean: np.ndarray | None, grid: Grid
) -> None:
    weight = linear.kernel[...].T
    quantized = on_mixed_grid(weight, jnp.asarray(bits, jnp.int32), grid=grid)
    if mean is not None:
        old = None if linear.bias is None else linear.bias[...]
        bias = corrected_bias(weight, quantized, jnp.asarray(mean, jnp.float32), old)
        if info.source_bytes == 2:  # a bias is stored in the source dtype
            bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
        linear.bias = nnx.Param(bias)
        linear.use_bias = True
    linear.kernel = nnx.Param(quantized.T)


def _check_means(index: ChannelIndex, means: Mapping[str, np.ndarray] | None) -> None:
    if means is None:
        raise InputError(
            "bias correction needs the mean input of every layer: pass means=table.means, or "
            "bias_correction=False"
        )
    for layer in index.layers:
        mean = means.get(layer.path)
        if mean is None or np.shape(mean) != (layer.fan_in,) or not np.isfinite(mean).all():
            found = "none" if mean is None else f"{np.shape(mean)}, maybe not finite"
            raise InputError(
                f"means: {layer.path} needs {layer.fan_in} finite mean inputs, got {found}"
            )
