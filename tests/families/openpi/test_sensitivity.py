"""Sensitivities through the Euler steps, whose layers are called once in each."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.families.openpi.layout import layout
from qvla_jax.families.openpi.network import Pi0Inputs
from qvla_jax.models import get_module
from qvla_jax.quantization import Quantizer, QuantizerSettings
from qvla_jax.quantization.layers import LayerRules, channel_index, quantizable_layers
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants, streamed_frame_costs
from qvla_jax.sensitivity.ranks import spearman
from qvla_jax.sensitivity.strata import module_types
from qvla_jax.sensitivity.sweep import Sweep

BITS = (0, 2, 4, 8)
FRAMES = 2


@dataclasses.dataclass(frozen=True)
class Stub:
    """What the methods need from a policy."""

    model: Any
    layout: Any

    def prepare(self, batch):
        return Pi0Inputs(**batch)

    def complete(self, inputs):
        return inputs


@dataclasses.dataclass(frozen=True)
class Frames:
    arrays: dict[str, Any]
    frames: int = FRAMES
    manifest: Any = dataclasses.field(default_factory=lambda: {"sha256": "openpi"})

    def batches(self, size):
        for start in range(0, self.frames, size):
            stop = start + size
            yield {k: None if v is None else v[start:stop] for k, v in self.arrays.items()}


def observations(config):
    rng = np.random.default_rng(0)
    size = config.image_size
    return Frames(
        {
            "images": rng.integers(0, 255, (FRAMES, 2, size, size, 3), np.uint8),
            "image_mask": np.array([[True, True], [True, False]]),
            "tokens": rng.integers(0, 20, (FRAMES, config.max_prompt_tokens)),
            "token_mask": np.arange(config.max_prompt_tokens)[None] < np.array([[5], [3]]),
            "noise": rng.normal(size=(FRAMES, config.action_horizon, config.action_dim)).astype(
                np.float32
            ),
            "state": rng.normal(size=(FRAMES, config.action_dim)).astype(np.float32)
            if config.variant == "pi0"
            else None,
        }
    )


class Rounding(Quantizer):
    """To nearest, up to the largest weight of a row; in numpy, for which nothing is compiled."""

    def __init__(self):
        super().__init__(QuantizerSettings(rounding="nearest", bias_correction=False), None)

    def clips(self, weight, options):
        return {}

    def row_changes(self, path, weight, options, *, clips=None):
        del path, clips
        weight = np.asarray(weight)
        largest = np.abs(weight).max(axis=1, keepdims=True)
        steps = [max(2 ** (bits - 1) - 1, 0) for bits in options]
        return np.stack(
            [np.round(weight / largest * n) * largest / max(n, 1) - weight for n in steps]
        ).astype(np.float32)


QUANTIZER = Rounding()


def sweep_of(model, rules, steps=None):
    """The entries that the robot executes count, and the first `steps` actions."""
    own = layout(model.config)
    return Sweep(
        policy=Stub(model, own), calibration=observations(model.config),
        index=channel_index(quantizable_layers(model, rules)), quantizer=QUANTIZER, bits=BITS,
        batch=FRAMES, steps=steps,
        weights=np.array(own.action_weights({}, model.config.action_dim), np.float32),
    )  # fmt: skip


# The last block of each part, of the first block what only the prefix reads, the embedding of
# patches, and all layers that keep their bits.
SWEPT = LayerRules(
    include=(
        r".*(encoderblock|layers)\.1\.",
        r".*layers\.0\.(attn\.(q_einsum|attn_vec_einsum)|mlp\.(gate|linear))$",
        r"PaliGemma\.(img\.(embedding|head)|llm\.final_norm_1)",
        r"action_|state_|time_",
    )
)


@pytest.fixture(scope="module")
def swept(models):
    """Variant -> a sweep, its changes of rows, and the first-order costs of each frame."""

    @functools.cache
    def of(variant):
        sweep = sweep_of(models[variant], SWEPT, {"pi0": 2, "pi05": None}[variant])
        constants = layer_constants(sweep.layers, QUANTIZER, BITS)
        return sweep, constants, np.concatenate([*frame_costs(sweep, constants, probes="full")])

    return of


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_first_order_is_that_of_forward_differentiation(swept, variant):
    sweep, constants, costs = swept(variant)
    graphdef, state = nnx.split(sweep.policy.model)
    inputs = sweep.policy.prepare(sweep.calibration.arrays)
    zeros = jax.tree.map(jnp.zeros_like, state)

    @jax.jit
    def change(tangent):
        """Of the whole chunk of every frame, all layers and steps included."""

        def act(state):
            with jax.default_matmul_precision("float32"):
                return nnx.merge(graphdef, state)(inputs)

        return jax.jvp(act, (state,), (tangent,))[1]

    column, reached = BITS.index(4), set()
    for layer, rows in sweep.index.items():
        row = layer.out_features // 2
        direction = nnx.merge(graphdef, zeros)
        kernel = np.zeros((layer.fan_in, layer.out_features), np.float32)
        kernel[:, row] = constants[layer.path]["changes"][column, row]
        get_module(direction, layer.path).kernel = nnx.Param(kernel)
        moved = np.asarray(change(nnx.split(direction)[1]), np.float64)
        expected = np.sum(sweep.weights * moved[:, : sweep.steps] ** 2, axis=(1, 2))
        found = costs[:, rows.start + row, column]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-12, err_msg=layer.path)
        if expected.any():
            reached.add(sweep.policy.layout.module_type(layer.path))
    # Of the prefix, in front of the loop over steps, as well as of the expert in it.
    assert {"img.embedding", "img.head", "llm.attn.q_einsum", "llm.mlp.linear"} <= reached
    assert {"llm.attn.q_einsum_1", "llm.mlp_1.linear", "action_in_proj"} <= reached


def test_first_order_orders_channels_as_exact_probing_does(swept):
    sweep, _, costs = swept("pi05")
    costs = costs.mean(axis=0)
    index = sweep.index
    # Two rows of every module type.
    _, numbers = module_types(index, sweep.policy.layout)
    rows = np.sort([row for kind in set(numbers) for row in np.flatnonzero(numbers == kind)[-2:]])
    exact, _ = exact_costs(sweep, rows=rows)
    for column, (bits, least) in enumerate(zip(BITS, (0.9, 0.9, 0.98, 0.98), strict=True)):
        assert spearman(costs[rows, column], exact[:, column]) >= least, bits


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_layers_that_keep_their_bits_are_measured_and_unread_ones_cost_nothing(swept, variant):
    sweep, _, costs = swept(variant)
    own = sweep.policy.layout
    for layer, rows in sweep.index.items():
        unread = any(f"{layer.path}.".startswith(f"{path}.") for path in own.unread)
        assert costs[:, rows].any() != unread, layer.path


def test_streamed_costs_are_those_of_the_whole_pass(swept):
    sweep, _, whole = swept("pi0")
    streamed = np.concatenate([*streamed_frame_costs(sweep, probes="full")])
    np.testing.assert_allclose(streamed, whole, rtol=1e-3, atol=1e-6 * whole.max())


def test_conditioning_is_not_streamed(models):
    sweep = sweep_of(models["pi05"], LayerRules(include=(r".*Dense_0",)))
    with pytest.raises(InputError, match="Dense_0 is called outside of every stage"):
        next(streamed_frame_costs(sweep, probes=2))


def test_exact_costs_are_those_of_quantized_weights(models):
    model = models["pi05"]
    policy, frames = Stub(model, layout(model.config)), observations(model.config)
    layers = quantizable_layers(model, policy.layout.rules)
    index = channel_index(layers)
    quantizer = QUANTIZER
    # One row of every layer of the last block, expert and language model, and of the tower.
    rows = np.asarray(
        [
            place.start + 1
            for layer, place in index.items()
            if ".1." in layer.path or layer.path.endswith("embedding")
        ]
    )
    sweep = Sweep(
        policy=policy, calibration=frames, index=index, quantizer=quantizer, bits=(0, 4), batch=2,
        steps=1,
    )  # fmt: skip
    found, _ = exact_costs(sweep, rows=rows)

    graphdef, state = nnx.split(model)
    inputs = policy.prepare(frames.arrays)

    @jax.jit
    def act(state):
        with jax.default_matmul_precision("float32"):
            return nnx.merge(graphdef, state)(inputs)

    reference = np.asarray(act(state), np.float64)
    expected = np.zeros_like(found)
    for place, row in enumerate(rows):
        path, channel = index.paths[index.layer_of[row]], int(index.channel[row])
        weight = layers[path].kernel[...]
        changes = np.asarray(quantizer.row_changes(path, weight.T, sweep.bits))
        for column in range(len(sweep.bits)):
            copy = nnx.merge(graphdef, state)
            changed = np.asarray(weight).copy()
            changed[:, channel] += changes[column, channel]
            get_module(copy, path).kernel = nnx.Param(changed)
            change = np.asarray(act(nnx.split(copy)[1]), np.float64) - reference
            expected[place, column] = np.mean(np.sum(change[:, :1] ** 2, axis=(1, 2)))
    assert (expected > 0).mean() > 0.7  # nothing reads the rest of the prefix's last layer
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-9 * expected.max())
