"""Quantizing a policy: module surgery that puts weights on their grids and corrects biases."""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Int
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.quantization.bias import corrected_bias
from qvla_jax.quantization.grid import BITS, SOURCE
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import (
    DEFAULT_RULES,
    LayerRules,
    channel_index,
    quantizable_layers,
)
from qvla_jax.quantization.quantizer import (
    NEAREST_UNCORRECTED,
    UNIFORM_BASELINE,
    Quantizer,
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
    quantizer: Quantizer | None = None,
    rules: LayerRules = DEFAULT_RULES,
) -> QuantizedPolicy:
    """A copy of the policy with every channel at its bit-width; the source is left as it is.

    16-bit channels keep their weights bit for bit. Execution is simulated for now: the values are
    those of the grids, in float32.

    Args:
        policy: the full-precision policy.
        bits: 0, 2, 3, 4, 8 or 16 for each channel, in the order of `policy_index(policy)`, which is
            that of a sensitivity table.
        quantizer: grid, rounding and bias correction, with the input statistics that they need.
            Bits that come from `SensitivityTable.bits_of` bring it along; without either, rows are
            rounded to the nearest point of the fitted grid and biases stay as they are.
        rules: which layers are quantized.

    Raises:
        InputError: a weight is NaN or infinite (named by layer and channel), `bits` has the wrong
            length or holds a width that is no option, or the statistics do not fit a layer.
    """
    if isinstance(policy, QuantizedPolicy):
        raise InputError("the policy is quantized already; quantize the full-precision one")
    layers = quantizable_layers(policy.model, rules)
    index = channel_index(layers)
    chosen = index.check_bits(bits, BITS)
    used = _quantizer_of(bits) if quantizer is None else quantizer
    used.check(index)
    # A copy with Variables of its own; arrays that do not change are shared.
    model = nnx.merge(*nnx.split(policy.model))
    copies = quantizable_layers(model, rules)
    for layer, rows in index.items():
        if np.any(chosen[rows] != SOURCE):
            _quantize_layer(copies[layer.path], layer, chosen[rows], used)
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(Policy)}
    return QuantizedPolicy(
        **{**fields, "model": model},
        index=index,
        bits=chosen,
        bias_corrected=used.settings.bias_correction,
    )


def _quantizer_of(bits: Any) -> Quantizer:
    """The quantizer that a table's bits bring along.

    Raises:
        InputError: the table was loaded without the statistics that its quantizer needs.
    """
    brought = getattr(bits, "quantizer", None)
    if brought is not None:
        return brought
    return Quantizer(getattr(bits, "settings", None) or NEAREST_UNCORRECTED)


def quantize_uniform(
    policy: Policy,
    bits: int,
    *,
    quantizer: Quantizer | None = None,
    rules: LayerRules = DEFAULT_RULES,
) -> QuantizedPolicy:
    """One bit-width everywhere: a baseline.

    Args:
        policy: the full-precision policy.
        bits: of every channel.
        quantizer: None rounds to nearest on the "rtn" grid, without bias correction.
        rules: which layers are quantized.
    """
    count = len(policy_index(policy, rules))
    quantizer = Quantizer(UNIFORM_BASELINE) if quantizer is None else quantizer
    return quantize(policy, np.full(count, bits), quantizer=quantizer, rules=rules)


def _quantize_layer(
    linear: nnx.Linear, info: LayerInfo, bits: np.ndarray, quantizer: Quantizer
) -> None:
    weight = linear.kernel[...].T
    quantized = quantizer.rows(info.path, weight, bits)
    mean = quantizer.mean(info.path)
    if mean is not None:
        old = None if linear.bias is None else linear.bias[...]
        bias = corrected_bias(weight, quantized, jnp.asarray(mean, jnp.float32), old)
        if info.source_bytes == 2:  # a bias is stored in the source dtype
            bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
        linear.bias = nnx.Param(bias)
        linear.use_bias = True
    linear.kernel = nnx.Param(quantized.T)
