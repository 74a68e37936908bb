"""Quantizing a policy: module surgery that packs weights and corrects biases."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_embed import round_embeddings
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.packing import pack_layer
from qvla_jax.inference.policy import Policy
from qvla_jax.kernels import LayerInputs
from qvla_jax.precision import in_32_bits
from qvla_jax.quantization.allocation import Allocation
from qvla_jax.quantization.bias import corrected_bias
from qvla_jax.quantization.codes import BITS, PRUNED, SOURCE
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import LayerRules, channel_index, quantizable_layers
from qvla_jax.quantization.quantizer import (
    UNIFORM_BASELINE,
    Quantizer,
)
from qvla_jax.quantization.rotation import rotate, rotate_back
from qvla_jax.quantization.rows import QuantizedRows


def policy_layers(policy: Policy, rules: LayerRules | None = None) -> dict[str, nnx.Linear]:
    """The policy's quantized layers, by path.

    Args:
        policy: in full precision.
        rules: which layers are quantized; None takes those of the policy's layout.

    Raises:
        InputError: a rule matches nothing.
    """
    return quantizable_layers(policy.model, policy.layout.rules if rules is None else rules)


def policy_index(policy: Policy, rules: LayerRules | None = None) -> ChannelIndex:
    """The policy's quantized layers and the order of their channels; see `policy_layers`.

    Raises:
        InputError: a weight is NaN or infinite, or a rule matches nothing.
    """
    return channel_index(policy_layers(policy, rules))


@in_32_bits
def quantize(
    policy: Policy,
    allocation: Allocation | Int[np.ndarray, " C"],
    *,
    quantizer: Quantizer | None = None,
    rules: LayerRules | None = None,
    packed: bool = True,
    embedding_bits: int = SOURCE,
) -> Policy:
    """A copy of the policy with every channel at its bit-width; the source is not changed.

    >>> import qvla_jax
    >>> from qvla_jax.quantization import NEAREST_UNCORRECTED, Quantizer
    >>> policy = qvla_jax.random_policy("tiny-test")
    >>> bits = np.resize([8, 4, 2, 4], len(policy_index(policy)))  # or an `Allocation`
    >>> packed = qvla_jax.quantize(policy, bits, quantizer=Quantizer(NEAREST_UNCORRECTED))
    >>> packed.save("tiny.qvla")
    >>> again = qvla_jax.load_policy("tiny.qvla")
    >>> observation = policy.fake_observation()
    >>> bool((again.infer(observation) == packed.infer(observation)).all())
    True

    Its quantized layers are `PackedLinear`s: they hold packed words and no matrix of floats. They
    store exactly the bytes that `quantization.layout` counts, and 16-bit channels keep their
    weights bit for bit.

    Args:
        policy: the full-precision policy.
        allocation: from `allocate`; or plain bits, 0, 2, 3, 4, 8 or 16 for each channel, in the
            order of `policy_index(policy)`, which is that of a sensitivity table.
        quantizer: grid, rounding and bias correction, with the input statistics that they need;
            required for plain bits. None takes that of the allocation.
        rules: which layers are quantized; None takes those of the policy's layout.
        packed: False keeps ordinary layers with the same values in float32, which need the memory
            of full precision. All allocations then share one compiled program, while packed layers
            of other shapes are recompiled; useful for searches and sweeps. A layer whose channels
            all have 16 bits is then the unchanged source layer.
        embedding_bits: bits of the rows of token embeddings, rounded to nearest with a scale for
            each row: 8 (4, 3 and 2 work, too), or 16, as they are.

    Raises:
        InputError: a weight is NaN or infinite (named by layer and channel), the allocation is for
            other layers, plain bits have the wrong length or a width that is not an option, there
            is no quantizer, or its statistics do not fit a layer.
    """
    quantizer = _quantizer_of(allocation) if quantizer is None else quantizer
    found = _quantize(policy, allocation, quantizer, rules, packed=packed, index=True)
    return with_embeddings(found, embedding_bits, packed=packed)


def with_embeddings(policy: Policy, bits: int, *, packed: bool) -> Policy:
    """A quantized policy with token embeddings of these bits; its modules are changed."""
    if bits != SOURCE:
        round_embeddings(policy.model, bits, packed=packed)
    return policy


def _quantizer_of(allocation: Allocation | Int[np.ndarray, " C"]) -> Quantizer:
    if not isinstance(allocation, Allocation):
        raise InputError(
            "plain bits do not say how rows are rounded: give an allocation from "
            "`qvla_jax.allocate`, or `quantizer=`, such as the table's (`table.quantizer`) or "
            "`Quantizer(NEAREST_UNCORRECTED)` of qvla_jax.quantization"
        )
    if allocation.quantizer is None:
        raise InputError(
            "the allocation's table was loaded without the input statistics that its quantizer "
            "needs: load it with `statistics=`, or give `quantizer=`"
        )
    return allocation.quantizer


def _quantize(
    policy: Policy,
    allocation: Allocation | Int[np.ndarray, " C"],
    quantizer: Quantizer,
    rules: LayerRules | None,
    *,
    packed: bool,
    index: bool,
) -> Policy:
    if policy.quantization is not None:
        raise InputError("the policy is quantized already; quantize the full-precision one")
    rules = policy.layout.rules if rules is None else rules
    channels = policy_index(policy, rules)
    if isinstance(allocation, Allocation):
        allocation.check(channels)
        bits = allocation.bits
    else:
        bits = allocation
    chosen = channels.check_bits(bits, BITS)
    quantizer.check(channels)
    # A copy with its own Variables; arrays that do not change are shared.
    model = nnx.merge(*nnx.split(policy.model))
    copies = quantizable_layers(model, rules)
    if packed:
        weights = (
            (
                layer.path,
                pack_layer(
                    layer,
                    *_quantize_layer(copies[layer.path], layer, chosen[rows], quantizer),
                    index=index,
                ),
            )
            for layer, rows in channels.items()
        )
        given = LayerInputs(rotated=quantizer.settings.rotation)
        inputs = dict.fromkeys(channels.paths, given)
        replace_by_packed(model, weights, inputs, same_input=policy.layout.same_input)
    for layer, rows in channels.items():
        linear, widths = copies[layer.path], chosen[rows]
        if not packed and np.any(widths != SOURCE):
            own, source, bias = _quantize_layer(linear, layer, widths, quantizer)
            values = own.dequantized(source)
            if quantizer.settings.rotation:
                values = rotate_back(values)
            linear.kernel = nnx.Param(values.T)
            if bias is not None:
                linear.bias, linear.use_bias = nnx.Param(bias), True
    statistics = quantizer.statistics if quantizer.settings.needs_statistics else None
    return dataclasses.replace(
        policy,
        model=model,
        quantization={
            "quantizer": dataclasses.asdict(quantizer.settings),
            "policy fingerprint": policy.fingerprint,
            "calibration hash": None
            if statistics is None
            else statistics.made_from.get("calibration"),
        },
    )


@in_32_bits
def quantize_uniform(
    policy: Policy,
    bits: int,
    *,
    quantizer: Quantizer | None = None,
    rules: LayerRules | None = None,
    packed: bool = True,
    embedding_bits: int = SOURCE,
) -> Policy:
    """A baseline with one bit-width everywhere, which stores no output index.

    Args:
        policy: the full-precision policy.
        bits: bit-width of every channel.
        quantizer: None rounds to nearest on the "rtn" grid, without bias correction.
        rules: as in `quantize`.
        packed: as in `quantize`.
        embedding_bits: as in `quantize`.
    """
    widths = np.full(len(policy_index(policy, rules)), bits)
    quantizer = Quantizer(UNIFORM_BASELINE) if quantizer is None else quantizer
    found = _quantize(policy, widths, quantizer, rules, packed=packed, index=bits == PRUNED)
    return with_embeddings(found, embedding_bits, packed=packed)


def rotated_source(linear: nnx.Linear, info: LayerInfo) -> Float[Array, "c k"]:
    """The rotated rows that 16-bit channels keep: in the source dtype, held in float32."""
    rows = rotate(linear.kernel[...].T)
    return rows.astype(jnp.bfloat16).astype(jnp.float32) if info.source_bytes == 2 else rows


def _quantize_layer(
    linear: nnx.Linear, info: LayerInfo, bits: np.ndarray, quantizer: Quantizer
) -> tuple[QuantizedRows, Float[Array, "c k"], Float[Array, " c"] | None]:
    """Codes, the rows they stand for, and the bias with its correction in float32.

    With rotation the rows are rotated ones.
    """
    source = linear.kernel[...].T
    if quantizer.settings.rotation:
        source = rotated_source(linear, info)
    rows = quantizer.quantized(info.path, source, bits)
    bias = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
    mean = quantizer.mean(info.path)
    if mean is not None:
        shift = jnp.asarray(mean, jnp.float32)
        shift = rotate(shift) if quantizer.settings.rotation else shift
        bias = corrected_bias(source, rows.dequantized(source), shift, bias)
        if info.source_bytes == 2:  # a bias is stored in the source dtype
            bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
    return rows, source, bias
