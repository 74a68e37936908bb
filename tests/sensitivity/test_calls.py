"""Layers that a forward pass calls several times: a change of a row changes all of its calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.inference.quantize import policy_index, policy_layers, quantize
from qvla_jax.methods.moments import input_moments
from qvla_jax.models.linear import Linear
from qvla_jax.quantization import LayerRules, Quantizer, QuantizerSettings
from qvla_jax.quantization.grid import on_grid
from qvla_jax.sensitivity import input_statistics, sensitivities
from qvla_jax.sensitivity.input_hessian import input_hessians
from qvla_jax.sensitivity.stages import Order, downstream
from qvla_jax.sensitivity.sweep import Sweep

from .toys import ACTIONS, HORIZON, LAYOUT, TEXT, WIDTH, ToyPolicy, toy_policy

STEPS, HIDDEN = 3, 5
LAYERS = ("expert.gate", "expert.out", "expert.up", "prefix.fc")
BITS = (0, 4)


class Prefix(nnx.Module):
    """Called once."""

    def __init__(self, rngs):
        self.fc = Linear(2 * WIDTH, HIDDEN, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.fc(x))


class Expert(nnx.Module):
    """Called in every step; two of its layers take the same input."""

    def __init__(self, rngs):
        self.gate = Linear(HIDDEN, HIDDEN, use_bias=False, rngs=rngs)
        self.up = Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.out = Linear(HIDDEN, HIDDEN, rngs=rngs)

    def __call__(self, x):
        return x + 0.6 * self.out(jax.nn.silu(self.gate(x)) * self.up(x))


class Stepping(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(3)
        self.prefix, self.expert = Prefix(rngs), Expert(rngs)
        self.head = Linear(TEXT * HIDDEN, HORIZON * ACTIONS, rngs=rngs)

    def __call__(self, inputs):
        x = self.prefix(inputs["text"])
        for _ in range(STEPS):
            x = self.expert(x)
        return self.head(x.reshape(len(x), -1)).reshape(-1, HORIZON, ACTIONS)

    def actions(self, inputs, conditioning=None):
        return self(inputs)


class SteppingPolicy(ToyPolicy):
    layout = dataclasses.replace(
        LAYOUT,
        rules=LayerRules(include=(r"prefix\.", r"expert\.")),
        kept=("head",),
        stages=("prefix", "expert"),
        parts=(),
        same_input=(("gate", "up"),),
    )


@pytest.fixture(scope="module")
def stepping():
    toy = toy_policy()
    return SteppingPolicy(
        config=toy.config, processor=toy.processor, statistics={}, model=Stepping()
    )


@pytest.fixture(scope="module")
def quantizer(stepping, frames):
    statistics = input_statistics(stepping, frames, policy_index(stepping))
    return Quantizer(QuantizerSettings(rounding="nearest"), statistics)


def parameters(policy):
    """Path -> (kernel, bias)."""
    layers = {**policy_layers(policy), "head": policy.model.head}
    return {
        path: (layer.kernel[...], 0.0 if layer.bias is None else layer.bias[...])
        for path, layer in layers.items()
    }


def plain(parameters, text, nudges=None):
    """The network in plain formulas.

    Args:
        parameters: path -> (kernel, bias).
        text: [b, t, k].
        nudges: path -> an array for each call, added to the layer's output.

    Returns:
        The action, and the layers' inputs call by call.
    """
    seen = {path: [] for path in parameters}

    def linear(path, x):
        number = len(seen[path])
        seen[path].append(x)
        kernel, bias = parameters[path]
        y = jnp.einsum("...k,kc->...c", x, kernel, precision="highest")
        y = y + jnp.broadcast_to(bias, y.shape)
        return y if nudges is None else y + nudges[path][number]

    x = jnp.tanh(linear("prefix.fc", text))
    for _ in range(STEPS):
        inner = jax.nn.silu(linear("expert.gate", x)) * linear("expert.up", x)
        x = x + 0.6 * linear("expert.out", inner)
    y = linear("head", x.reshape(len(x), -1))
    return y.reshape(-1, HORIZON, ACTIONS), seen


def plain_inputs(policy, frames):
    """Path -> inputs of all calls side by side, [b, T, k]."""
    _, seen = plain(parameters(policy), frames.whole()["text"])
    return {path: np.concatenate(seen[path], axis=1, dtype=np.float64) for path in LAYERS}


def measured(policy, frames, quantizer, method, **settings):
    table = sensitivities(
        policy, frames, method=method, bits=(*BITS, 16), quantizer=quantizer.settings,
        statistics=quantizer.statistics, joint=False, batch=4, **settings,
    )  # fmt: skip
    assert table.index.paths == LAYERS
    return table.costs[:, :-1]


@pytest.fixture(scope="module")
def exact(stepping, frames, quantizer):
    return measured(stepping, frames, quantizer, "exact")


def test_exact_costs_are_those_of_quantized_weights(stepping, frames, quantizer, exact):
    index, batch = policy_index(stepping), frames.whole()
    reference = stepping.infer_normalized(batch).astype(np.float64)
    expected = np.zeros_like(exact)
    for row, column in np.ndindex(*exact.shape):
        bits = np.full(len(index), 16)
        bits[row] = BITS[column]
        changed = quantize(stepping, bits, quantizer=quantizer, packed=False)
        change = changed.infer_normalized(batch) - reference
        expected[row, column] = np.mean(np.sum(change**2, axis=(1, 2)))
    np.testing.assert_allclose(exact, expected, rtol=2e-3, atol=1e-10)


def test_first_order_is_that_of_the_weights(stepping, frames, quantizer):
    """Against the Jacobian with respect to kernel and bias, which all calls share."""
    found = measured(stepping, frames, quantizer, "jacobian", probes="full")
    own, text = parameters(stepping), frames.whole()["text"]
    for layer, rows in policy_index(stepping).items():
        kernel, bias = own[layer.path]

        def action(kernel, shift, path=layer.path, bias=bias):
            return plain({**own, path: (kernel, bias + shift)}, text)[0]

        by_kernel, by_bias = jax.jacobian(action, (0, 1))(kernel, jnp.zeros(kernel.shape[1]))
        for column, bits in enumerate(BITS):
            change = np.asarray(on_grid(kernel.T, bits, grid="fitted")).T - np.asarray(kernel)
            shift = -quantizer.mean(layer.path) @ change
            change = np.einsum("...kc,kc->...c", by_kernel, change) + np.asarray(by_bias) * shift
            expected = np.mean(np.sum(change**2, axis=(1, 2)), axis=0)
            np.testing.assert_allclose(found[rows, column], expected, rtol=1e-3, atol=1e-10)


def test_taylor_sums_over_the_outputs_of_all_calls(stepping, frames, quantizer):
    found = measured(stepping, frames, quantizer, "taylor", probes="full")
    own, text = parameters(stepping), frames.whole()["text"]
    _, seen = plain(own, text)
    zeros = {
        path: [jnp.zeros((*x.shape[:-1], own[path][0].shape[1])) for x in seen[path]]
        for path in seen
    }
    derivative = jax.jacobian(lambda nudges: plain(own, text, nudges)[0])(zeros)
    for layer, rows in policy_index(stepping).items():
        # Frames are independent: entries of one frame depend on the tokens of no other.
        square = sum(
            np.einsum("bhaetc->bc", np.square(np.asarray(call, np.float64)))
            for call in derivative[layer.path]
        ).mean(axis=0)
        kernel = own[layer.path][0].T
        for column, bits in enumerate(BITS):
            norm = np.sum(np.square(np.asarray(on_grid(kernel, bits, grid="fitted") - kernel)), 1)
            np.testing.assert_allclose(found[rows, column], square * norm, rtol=1e-3, atol=1e-10)


def test_the_whole_budget_gives_exact_costs(stepping, frames, quantizer, exact):
    found = measured(stepping, frames, quantizer, "refined", probes="full", exact_share=1.0)
    np.testing.assert_allclose(found, exact, rtol=3e-3, atol=1e-10)


def test_statistics_are_those_of_the_inputs_of_all_calls(stepping, frames):
    found = input_statistics(stepping, frames, policy_index(stepping), batch=2)
    for path, x in plain_inputs(stepping, frames).items():
        tokens = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(found.means[path], tokens.mean(axis=0), rtol=1e-4, atol=1e-5)
        covariance = np.cov(tokens.T, bias=True)
        np.testing.assert_allclose(found.covariance(path), covariance, rtol=1e-3, atol=1e-4)


def test_covariances_add_up_over_calls(stepping, frames):
    index = policy_index(stepping)
    found = input_hessians(Sweep(policy=stepping, calibration=frames, index=index, batch=2))
    for path, x in plain_inputs(stepping, frames).items():
        expected = 2 / len(x) * np.einsum("btj,btk->jk", x, x)
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["jacobian", "taylor"])
def test_a_stage_that_runs_several_times_is_streamed(stepping, frames, quantizer, method):
    whole = measured(stepping, frames, quantizer, method, probes=2)
    streamed = measured(stepping, frames, quantizer, method, probes=2, streamed=True)
    np.testing.assert_allclose(streamed, whole, rtol=1e-4, atol=1e-9)


def test_moments_of_qwix_know_layers_that_run_once(stepping, frames):
    with pytest.raises(InputError, match=r"expert\.\w+: runs several times"):
        input_moments(stepping, frames, policy_index(stepping))


def test_a_later_call_depends_on_layers_with_the_same_input(stepping):
    once = Order(["expert", "expert.gate", "expert.up", "expert.out"], [4, 2, 3, 4])
    prefix, twice = Order(["prefix"], [1]), Order()
    twice.extend(once, 2)
    prefix.extend(once, 2)

    def again(order, layer):
        return sorted(downstream(order, [layer], stepping.layout))

    assert again(once, "expert.gate") == [("expert", 0), ("expert.out", 0)]
    later = [(part, 1) for part in once.paths]
    assert again(twice, "expert.gate") == sorted([("expert", 0), ("expert.out", 0), *later])
    # The prefix stays, and so does what comes before the first change.
    assert again(prefix, "expert.out") == sorted([("expert", 0), *later])
