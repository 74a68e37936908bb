"""Sensitivities through the Euler steps, whose layers are called once in each."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from qvla_jax.families.openpi.layout import layout
from qvla_jax.families.openpi.network import Pi0Inputs
from qvla_jax.models import get_module
from qvla_jax.quantization import Quantizer, QuantizerSettings
from qvla_jax.quantization.layers import channel_index, quantizable_layers
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.sweep import Sweep

BITS = (0, 4)
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


def test_exact_costs_are_those_of_quantized_weights(models):
    model = models["pi05"]
    policy, frames = Stub(model, layout(model.config)), observations(model.config)
    layers = quantizable_layers(model, policy.layout.rules)
    index = channel_index(layers)
    quantizer = Quantizer(QuantizerSettings(rounding="nearest", bias_correction=False), None)
    # One row of every layer of the last block, expert and language model, and of the tower.
    rows = np.asarray(
        [
            place.start + 1
            for layer, place in index.items()
            if ".1." in layer.path or layer.path.endswith("embedding")
        ]
    )
    sweep = Sweep(
        policy=policy, calibration=frames, index=index, quantizer=quantizer, bits=BITS, batch=2
    )
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
        changes = np.asarray(quantizer.row_changes(path, weight.T, BITS))
        for column in range(len(BITS)):
            copy = nnx.merge(graphdef, state)
            changed = np.asarray(weight).copy()
            changed[:, channel] += changes[column, channel]
            get_module(copy, path).kernel = nnx.Param(changed)
            change = np.asarray(act(nnx.split(copy)[1]), np.float64) - reference
            expected[place, column] = np.mean(np.sum(change**2, axis=(1, 2)))
    assert (expected > 0).mean() > 0.7  # nothing reads the rest of the prefix's last layer
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-9 * expected.max())
