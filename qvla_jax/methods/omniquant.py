"""OmniQuant (Shao et al. 2024, arXiv 2308.13137): learned clips, and learned input scales.

qwix does not have it, so the equations are implemented here. Blocks are taken in the order in which
the policy calls them; each is fitted to its full-precision outputs by gradient descent (equation
1),

    min over clips and scales of || F(W, X) - F(Q(W), X_q) ||^2,

where X_q is the output of the preceding quantized blocks on the calibration frames. In each layer

    range = sigmoid(clip) max|w s|,  w_hat = step clamp(round(w s / step)),  step = range / bound,

with one clip for each row or group (learnable weight clipping, equation 2; symmetric, so the
paper's two clips become one), and s_i learned for each input if activations are rounded (learnable
equivalent transformation, equation 3, without its shifts), beginning at SmoothQuant's with alpha
1/2. Gradients pass straight through rounding. As published: AdamW without decay, clips beginning at
sigmoid(4), learning rates 1e-2 and 5e-3, 20 epochs.

All blocks' inputs and outputs on the calibration frames are held on the host.
"""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_linear import scale_inputs
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.kernels.activations import round_activations
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.moments import InputMoments
from qvla_jax.methods.numerics import effective_group, nearest, padded, uniform_rows
from qvla_jax.methods.packing import packed_policy
from qvla_jax.methods.settings import Setting
from qvla_jax.methods.smoothquant import smoothing_scales
from qvla_jax.models.surgery import get_module, named_modules, replace_modules
from qvla_jax.quantization import quantizable_layers
from qvla_jax.quantization.rows import QuantizedRows
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.stages import stage_paths, wrap_stages

_EPOCHS: Final = 20
_BATCH: Final = 4
_CLIP_START: Final = 4.0
_CLIP_RATE, _SCALE_RATE = 1e-2, 5e-3

# Of one layer: "clip" [c, g] before the sigmoid, "log_scale" [k].
Learned: TypeAlias = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Bits and groups of a layer."""

    bits: int
    group: int | None
    activation_bits: int


def _round(x: Array) -> Array:
    """Nearest integers, with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _steps(weight: Float[Array, "c k"], clip: Float[Array, "c g"], grid: Grid) -> Array:
    """Step of each row's groups [c, g]."""
    grouped = _grouped(weight, grid)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    bound = 2 ** (grid.bits - 1) - 0.5
    return jax.nn.sigmoid(clip) * jnp.maximum(largest, 1e-30) / bound


def _grouped(weight: Float[Array, "c k"], grid: Grid) -> Float[Array, "c g i"]:
    own = effective_group(weight.shape[1], grid.group)
    rows = padded(weight, own)
    return rows.reshape(len(rows), -1, rows.shape[1] if own is None else own)


def _codes(weight: Float[Array, "c k"], steps: Float[Array, "c g"], grid: Grid) -> Array:
    """Codes [c, k] as float32."""
    grouped = _grouped(weight, grid)
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    rounded = _round(grouped / steps[..., None])
    # Not `jnp.clip`, which halves the gradient of the outermost codes themselves.
    codes = jnp.where(rounded < low, low, jnp.where(rounded > high, high, rounded))
    return codes.reshape(len(codes), -1)[:, : weight.shape[1]]


def fake_quantized(
    weight: Float[Array, "c k"], clip: Float[Array, "c g"], grid: Grid
) -> Float[Array, "c k"]:
    """w_hat, differentiable in the weight and the clip."""
    steps = _steps(weight, clip, grid)
    own = effective_group(weight.shape[1], grid.group)
    wide = jnp.repeat(steps, weight.shape[1] if own is None else own, axis=1)
    return _codes(weight, steps, grid) * wide[:, : weight.shape[1]]


class _Fitted(nnx.Module):
    """A linear layer with its learned parameters applied."""

    def __init__(self, linear: nnx.Linear, learned: Learned, grid: Grid):
        scale = jnp.exp(learned["log_scale"])
        weight = linear.kernel[...].T.astype(jnp.float32) * scale[None]
        self.kernel = nnx.Param(fake_quantized(weight, learned["clip"], grid).T)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
        self.multiplier = nnx.Param(1 / scale)
        self.activation_bits = grid.activation_bits

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> [..., c]."""
        x = scale_inputs(x, self.multiplier[...])
        x = x + jax.lax.stop_gradient(round_activations(x, self.activation_bits) - x)
        y = x.reshape(-1, x.shape[-1]) @ self.kernel[...]
        y = y if self.bias is None else y + self.bias[...][None]
        return y.reshape(*x.shape[:-1], -1)


def _run(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    learned: Mapping[str, Learned],
    args: Any,
    grid: Grid,
) -> Array:
    block: Any = nnx.merge(graphdef, state)
    linears = named_modules(block, nnx.Linear)
    replace_modules(block, {p: _Fitted(linears[p], own, grid) for p, own in learned.items()})
    with jax.default_matmul_precision("float32"):
        return block(*args)


_forward = jax.jit(_run, static_argnums=(0, 4))


def _optimizer(learned: Mapping[str, Learned]) -> optax.GradientTransformation:
    labels = {p: {name: name for name in own} for p, own in learned.items()}
    rates: dict[Hashable, optax.GradientTransformation] = {
        "clip": optax.adam(_CLIP_RATE),
        "log_scale": optax.adam(_SCALE_RATE),
    }
    return optax.multi_transform(rates, labels)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _epoch(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    carry: tuple[Any, Any],
    args: Any,
    targets: Array,
    grid: Grid,
) -> tuple[tuple[Any, Any], Array]:
    """One step for each batch [n, b, ...]; returns the mean of their losses before the steps."""
    learns_scale = grid.activation_bits != 16

    def step(carry: tuple[Any, Any], batch: tuple[Any, Array]) -> tuple[tuple[Any, Any], Array]:
        learned, memory = carry
        inputs, target = batch

        def loss(learned: Any) -> Array:
            return jnp.mean(jnp.square(_run(graphdef, state, learned, inputs, grid) - target))

        value, gradient = jax.value_and_grad(loss)(learned)
        if not learns_scale:
            gradient = {p: {**g, "log_scale": 0 * g["log_scale"]} for p, g in gradient.items()}
        updates, memory = _optimizer(learned).update(gradient, memory, learned)
        return (optax.apply_updates(learned, updates), memory), value

    carry, losses = jax.lax.scan(step, carry, (args, targets))
    return carry, jnp.mean(losses)


def fit_block(
    block: nnx.Module,
    start: Mapping[str, Learned],
    args: Any,
    targets: Float[np.ndarray, "n b ..."],
    grid: Grid,
    *,
    epochs: int = _EPOCHS,
) -> tuple[dict[str, Learned], list[float]]:
    """The learned parameters of a block's layers, and the mean loss of each epoch.

    Args:
        block: full precision.
        start: initial values, by the layer's path within the block.
        args: of its calls, batches along the first axis of every array.
        targets: its full-precision outputs.
        grid: bits and groups.
        epochs: passes over the batches; the result is that of the pass with the smallest loss.
    """
    graphdef, state = nnx.split(block)
    carry = (dict(start), _optimizer(start).init(dict(start)))
    best, losses = dict(start), []
    for _ in range(epochs):
        # Optax mixes Python numbers and integers.
        with jax.numpy_dtype_promotion("standard"):
            carry, loss = _epoch(graphdef, state, carry, args, targets, grid)
        if not losses or float(loss) < min(losses):
            best = carry[0]
        losses.append(float(loss))
    return best, losses


def learned_rows(weight: Float[Array, "c k"], learned: Learned, grid: Grid) -> QuantizedRows:
    """Codes, scales and input scale as they are stored: steps and multipliers in bfloat16."""
    multiplier = _bfloat16(1 / jnp.exp(learned["log_scale"]))
    rows = weight.astype(jnp.float32) / multiplier[None]
    steps = _bfloat16(_steps(rows, learned["clip"], grid))
    plain = bool((multiplier == 1).all())
    quantized = uniform_rows(
        np.asarray(_codes(rows, steps, grid)),
        np.asarray(steps),
        grid.bits,
        effective_group(weight.shape[1], grid.group),
    )
    return dataclasses.replace(quantized, input_scale=None if plain else np.asarray(multiplier))


def omniquant_policy(measured: Measurements, setting: Setting) -> Policy:
    """Fits block after block and packs the result."""
    policy = measured.policy
    index = policy_index(policy, measured.rules)
    grid = Grid(int(setting.bits), setting.group, int(setting.activation_bits))
    rows: dict[str, QuantizedRows] = {}
    losses: dict[str, list[float]] = {}
    stages, calls = _recorded(policy, measured.calibration, index.paths)
    linears = quantizable_layers(policy.model, measured.rules)
    # Full-precision and quantized output of the previous block.
    last: tuple[np.ndarray, np.ndarray] | None = None
    for number, stage in enumerate(stages):
        measured.progress(setting.name, number, len(stages))
        args, targets = calls[stage]
        block: Any = get_module(policy.model, stage)
        if last is not None and np.array_equal(args[0], last[0]):
            args = (last[1], *args[1:])
        layers = {
            path.removeprefix(f"{stage}."): linear.kernel[...].T
            for path, linear in linears.items()
            if path.startswith(f"{stage}.")
        }
        start = {
            name: _start(weight, measured.moments.get(f"{stage}.{name}"), grid)
            for name, weight in layers.items()
        }
        learned, losses[stage] = fit_block(block, start, args, targets, grid)
        for name, weight in layers.items():
            rows[f"{stage}.{name}"] = learned_rows(weight, learned[name], grid)
        graphdef, state = nnx.split(block)
        outputs = [
            _forward(graphdef, state, learned, jax.tree.map(lambda a, i=i: a[i], args), grid)
            for i in range(len(targets))
        ]
        last = targets, np.stack(outputs)
    measured.progress(setting.name, len(stages), len(stages))
    every = (
        rows.get(path) or nearest(linears[path].kernel[...].T, grid.bits, grid.group)
        for path in index.paths
    )
    ratios = {stage: own[-1] / own[0] for stage, own in losses.items() if own[0] > 0}
    details = {"loss of the last epoch over that of the first": ratios}
    return packed_policy(measured, setting, every, details=details)


def _start(weight: Float[Array, "c k"], moments: InputMoments | None, grid: Grid) -> Learned:
    """Clips at sigmoid(4); scales of SmoothQuant where activations are rounded, else 1."""
    c, k = weight.shape
    own = effective_group(k, grid.group)
    clip = jnp.full((c, 1 if own is None else -(-k // own)), _CLIP_START)
    scales = np.ones(k, np.float32)
    if moments is not None and grid.activation_bits != 16:
        scales = smoothing_scales(weight, moments.largest, 0.5)
    return {"clip": clip, "log_scale": jnp.log(jnp.asarray(scales, jnp.float32))}


def _recorded(
    policy: Policy, calibration: Calibration, paths: Sequence[str]
) -> tuple[list[str], dict[str, tuple[Any, Float[np.ndarray, "n b ..."]]]]:
    """Blocks that hold quantized layers, in the order of their calls, with arguments and outputs.

    Batches of `_BATCH` frames along a new first axis; frames that do not fill a batch are left out
    (a smaller set is one batch).
    """
    wanted = [
        stage
        for stage in stage_paths(policy.model, policy.layout)
        if any(path.startswith(f"{stage}.") for path in paths)
    ]
    graphdef, state = nnx.split(policy.model)
    order: list[str] = []

    @jax.jit
    def forward(state: Any, inputs: Any) -> dict[str, tuple[Any, Array]]:
        seen: dict[str, tuple[Any, Array]] = {}
        order.clear()

        def call(path: str, inner: Any, *args: Any) -> Array:
            if path in seen:
                raise InputError(f"{path}: runs several times in a call; omniquant trains it once")
            order.append(path)
            seen[path] = args, inner(*args)
            return seen[path][1]

        model: Any = nnx.merge(graphdef, state)
        wrap_stages(model, wanted, call)
        with jax.default_matmul_precision("float32"):
            model(inputs)
        return seen

    size = min(_BATCH, calibration.frames)
    prepared = [policy.prepare(observations) for observations in calibration.batches(size)]
    batches = []
    for inputs in policy.processor.widened(prepared):
        inputs = policy.complete(jax.tree.map(jnp.asarray, inputs))
        if len(jax.tree.leaves(inputs)[0]) == size:
            batches.append(jax.device_get(forward(state, inputs)))
    if not batches:
        raise InputError("the calibration set holds no frames")
    return list(order), jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def _bfloat16(x: Array) -> Array:
    """Rounded to bfloat16, in float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
