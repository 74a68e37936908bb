"""End-to-end tuning: scales and biases of a packed policy by gradient descent on the action error.

Codes are fixed, so w_hat = s q is linear in the scale of its row and needs no gradient through the
rounding of weights; rounding of activations uses a straight-through estimator. The loss is the
squared error of what the robot executes of a chunk, against full precision on calibration frames,
so no labels are needed.
(EfficientQAT, arXiv 2407.11062, tunes step sizes end to end on the loss of a language model.) The
last frames are held back to choose the epoch; if none is better than the start, nothing is changed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Final, TypedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float
from qvla_jax.families.layout import Layout
from qvla_jax.inference.packed_linear import packed_layers, replace_by_packed, scale_inputs
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.unpacking import RoundingLinear, unpacked
from qvla_jax.kernels.activations import round_to
from qvla_jax.kernels.packed import segment_rows
from qvla_jax.models.surgery import named_modules, replace_modules
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.rotation import rotate
from qvla_jax.sensitivity.batches import Calibration

_EPOCHS: Final = 12
_BATCH: Final = 8
_RATE: Final = 1e-3
# One frame of this many is held back.
_HELD_BACK: Final = 8


class Tuned(TypedDict):
    """What is learned for a layer."""

    # Logarithm of the factor of each row's scale.
    log_gain: Float[Array, " c"]
    # Change of the bias, in units of the row's norm.
    shift: Float[Array, " c"]


class Fixed(TypedDict):
    """What a layer's rows store, by output channel."""

    # Scales, and 1 for rows without one.
    scale: Float[Array, " c"]
    # 1 for rows that have a scale.
    scaled: Float[Array, " c"]
    # Norm of each row, and 0 where the layer stores no bias.
    norm: Float[Array, " c"]
    bias: Float[Array, " c"]
    # 1 where the bias is stored in bfloat16.
    coarse: Float[Array, ""]


class _TunedLinear(nnx.Module):
    """A `RoundingLinear` with other scales and biases."""

    def __init__(self, layer: RoundingLinear, own: Tuned, fixed: Fixed):
        self.layer = layer
        scale, bias = _stored(own, fixed)
        self.gain, self.bias = nnx.Param(scale / fixed["scale"]), nnx.Param(bias)

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> [..., c]."""
        scaled = scale_inputs(x, self.layer.scale[...])
        if self.layer.rotated:
            scaled = rotate(scaled).astype(x.dtype)
        rounded = _straight_through(scaled, round_to(scaled, self.layer.largest_code[...]))
        y = jnp.matmul(rounded.reshape(-1, x.shape[-1]), self.layer.kernel[...])
        y = y * self.gain[...][None] + self.bias[...][None]
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _straight_through(x: Array, rounded: Array) -> Array:
    x = x.astype(jnp.float32)
    return x + jax.lax.stop_gradient(rounded - x)


def _bfloat16(x: Array) -> Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _stored(own: Tuned, fixed: Fixed) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Scales and biases as files hold them; gradients pass their rounding."""
    scale = fixed["scale"] * jnp.exp(own["log_gain"] * fixed["scaled"])
    bias = fixed["bias"] + own["shift"] * fixed["norm"]
    coarse = jnp.where(fixed["coarse"] > 0, _bfloat16(bias), bias)
    return _straight_through(scale, _bfloat16(scale)), _straight_through(bias, coarse)


@functools.partial(jax.jit, static_argnums=0)
def _error(
    spec: tuple[nnx.GraphDef[Any], Layout],
    state: Any,
    tuned: Mapping[str, Tuned],
    fixed: Mapping[str, Fixed],
    inputs: Any,
    target: Float[Array, "b h a"],
) -> Float[Array, ""]:
    graphdef, layout = spec
    model: Any = nnx.merge(graphdef, state)
    layers = named_modules(model, RoundingLinear)
    replace_modules(
        model, {path: _TunedLinear(layers[path], own, fixed[path]) for path, own in tuned.items()}
    )
    with jax.default_matmul_precision("float32"):
        change = layout.executed(model(inputs).astype(jnp.float32) - target)
        return jnp.mean(jnp.square(change))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    optimizer: optax.GradientTransformation,
    spec: tuple[nnx.GraphDef[Any], Layout],
    state: Any,
    tuned: Any,
    memory: Any,
    fixed: Mapping[str, Fixed],
    batch: tuple[Any, Float[Array, "b h a"]],
) -> tuple[Any, Any]:
    gradient = jax.grad(lambda own: _error(spec, state, own, fixed, *batch))(tuned)
    updates, memory = optimizer.update(gradient, memory, tuned)
    return optax.apply_updates(tuned, updates), memory


def tune(
    policy: Policy,
    packed: Policy,
    calibration: Calibration,
    *,
    epochs: int = _EPOCHS,
    rate: float = _RATE,
    progress: Progress = no_progress,
) -> Policy:
    """The packed policy with tuned scales and biases; it stores as many bytes as before.

    Args:
        policy: full precision.
        packed: made from it.
        calibration: the frames to tune on.
        epochs: passes over them.
        rate: Adam's learning rate, with cosine decay to 0.
        progress: called with the epochs done.

    Returns:
        A policy whose header says, in `tuning errors`, the action error on the frames that are held
        back, before and after each epoch.
    """
    model = unpacked(policy, packed, rounding=True).model
    graphdef, state = nnx.split(model)
    spec = graphdef, policy.layout
    layers = packed_layers(packed.model)
    weights = {path: layer.weight for path, layer in layers.items()}
    fixed = {path: _fixed(weight) for path, weight in weights.items()}
    tuned: Any = {
        path: Tuned(log_gain=jnp.zeros(w.shape[0]), shift=jnp.zeros(w.shape[0]))
        for path, w in weights.items()
    }
    used, held_back = _batches(policy, calibration)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(epochs * len(used), 1)))
    with jax.numpy_dtype_promotion("standard"):
        memory = optimizer.init(tuned)

    def error(own: Mapping[str, Tuned]) -> float:
        found = [float(_error(spec, state, own, fixed, *batch)) for batch in held_back]
        return float(np.mean(found))

    best, errors = tuned, [error(tuned)]
    order = np.random.default_rng(0)
    for epoch in range(epochs):
        progress("tuning", epoch, epochs)
        for number in order.permutation(len(used)):
            # Optax mixes Python numbers and integers.
            with jax.numpy_dtype_promotion("standard"):
                tuned, memory = _step(optimizer, spec, state, tuned, memory, fixed, used[number])
        errors.append(error(tuned))
        if errors[-1] <= min(errors):
            best = tuned
    progress("tuning", epochs, epochs)
    model = nnx.merge(*nnx.split(policy.model))
    replace_by_packed(
        model,
        [(path, _with(weights[path], *_stored(best[path], fixed[path]))) for path in weights],
        {path: layer.inputs for path, layer in layers.items()},
        same_input=policy.layout.same_input,
    )
    header = {**(packed.quantization or {}), "tuning errors": errors}
    return dataclasses.replace(packed, model=model, quantization=header)


def _batches(policy: Policy, calibration: Calibration) -> tuple[list[Any], list[Any]]:
    """Model inputs with the full-precision actions: those for tuning, and those held back."""
    # At least two batches.
    size = max(min(_BATCH, calibration.frames // 2), 1)
    graphdef, state = nnx.split(policy.model)

    @jax.jit
    def act(state: Any, inputs: Any) -> Float[Array, "b h a"]:
        with jax.default_matmul_precision("float32"):
            return nnx.merge(graphdef, state)(inputs).astype(jnp.float32)

    batches = []
    for observations in calibration.batches(size):
        inputs = policy.complete(jax.tree.map(jnp.asarray, policy.prepare(observations)))
        if len(jax.tree.leaves(inputs)[0]) == size:
            batches.append((inputs, act(state, inputs)))
    held_back = max(len(batches) // _HELD_BACK, 1)
    return batches[:-held_back], batches[-held_back:]


def _fixed(weight: kernels.PackedWeight) -> Fixed:
    c = weight.shape[0]
    scale, scaled = np.ones(c, np.float32), np.zeros(c, np.float32)
    for number, segment in enumerate(weight.segments):
        if segment.bits != SOURCE and weight.group is None:
            rows = segment_rows(weight, number)
            scale[rows] = np.asarray(weight.scales[number]).astype(np.float32)[:, 0]
            scaled[rows] = 1
    has_bias = weight.bias is not None
    norm = np.linalg.norm(np.asarray(kernels.dequantize(weight)), axis=1)
    # A pruned row has no norm; that of others says what a change of its output means.
    norm = np.where(norm > 0, norm, np.median(norm)) * has_bias
    bias = np.zeros(c, np.float32) if weight.bias is None else np.asarray(weight.bias)
    return Fixed(
        scale=jnp.asarray(scale), scaled=jnp.asarray(scaled),
        norm=jnp.asarray(norm, jnp.float32), bias=jnp.asarray(bias.astype(np.float32)),
        coarse=jnp.float32(has_bias and weight.source_dtype == "bfloat16"),
    )  # fmt: skip


def _with(
    weight: kernels.PackedWeight, scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> kernels.PackedWeight:
    """The same codes with other scales and biases."""
    own = np.asarray(scale)
    scales = tuple(
        stored
        if segment.bits == SOURCE or weight.group is not None
        else own[segment_rows(weight, number)][:, None].astype(ml_dtypes.bfloat16)
        for number, (segment, stored) in enumerate(zip(weight.segments, weight.scales, strict=True))
    )
    held = None if weight.bias is None else np.asarray(bias).astype(weight.bias.dtype)
    return dataclasses.replace(weight, scales=scales, bias=held)
