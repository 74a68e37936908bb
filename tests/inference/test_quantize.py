"""Quantizing whole policies."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.inference import random_policy
from qvla_jax.inference.quantize import policy_index, quantize, quantize_uniform
from qvla_jax.models import get_module
from qvla_jax.quantization import (
    NEAREST_UNCORRECTED,
    Allocation,
    ChannelIndex,
    InputStatistics,
    LayerRules,
    Quantizer,
    QuantizerSettings,
    quantizable_layers,
)
from qvla_jax.quantization.grid import on_grid

LLAMA = "language_model.model.layers.1.mlp.up_proj"
VISION = "vision_backbone.featurizer.blocks.0.attn.qkv"
PLAIN = Quantizer(NEAREST_UNCORRECTED)


@pytest.fixture(scope="module")
def policy():
    return random_policy("tiny-test")


@pytest.fixture(scope="module")
def index(policy):
    return policy_index(policy)


@pytest.fixture(scope="module")
def means(index):
    rng = np.random.default_rng(0)
    return {layer.path: rng.normal(size=layer.fan_in) for layer in index.layers}


@pytest.fixture(scope="module")
def nearest(means):
    return Quantizer(QuantizerSettings(rounding="nearest"), InputStatistics(means))


def rows(policy, path):
    return np.asarray(get_module(policy.model, path).kernel[...]).T


def test_towers_and_language_model_are_quantized_and_nothing_else(index):
    assert all(p.startswith(("vision_backbone.", "language_model.model.")) for p in index.paths)
    assert any(p.endswith("patch_embed.proj") for p in index.paths)
    assert LLAMA in index.paths


def test_weights_lie_on_their_grids_and_16_bits_are_identical(policy, index, nearest):
    bits = np.random.default_rng(1).choice([0, 2, 3, 4, 8, 16], size=len(index))
    result = quantize(policy, bits, quantizer=nearest, packed=False)
    assert result.quantization["quantizer"]["bias_correction"]
    for layer, where in index.items():
        source, found = rows(policy, layer.path), rows(result, layer.path)
        for width in np.unique(bits[where]):
            chosen = bits[where] == width
            expected = np.asarray(on_grid(jnp.asarray(source), int(width), grid="fitted"))
            np.testing.assert_array_equal(found[chosen], expected[chosen])
        assert found[bits[where] == 16].tobytes() == source[bits[where] == 16].tobytes()


def test_the_source_policy_is_left_as_it_is(policy, index, nearest):
    before = policy.fingerprint
    quantize(policy, np.zeros(len(index), int), quantizer=nearest)
    assert type(policy)(**vars_of(policy)).fingerprint == before
    assert get_module(policy.model, LLAMA).bias is None


def vars_of(policy):
    return {name: getattr(policy, name) for name in ("config", "model", "processor", "statistics")}


def test_pruned_channels_become_their_mean_output(policy, index, means, nearest):
    result = quantize(policy, np.zeros(len(index), int), quantizer=nearest, packed=False)
    for path in (LLAMA, VISION):
        source, pruned = get_module(policy.model, path), get_module(result.model, path)
        expected = rows(policy, path) @ means[path]
        if source.bias is not None:
            expected = expected + np.asarray(source.bias[...])
        np.testing.assert_allclose(pruned.bias[...], expected, rtol=1e-4, atol=1e-5)
        # And so they do in a forward pass, whatever comes in.
        x = jnp.ones((2, source.kernel.shape[0]))
        np.testing.assert_allclose(pruned(x)[1], expected, rtol=1e-4, atol=1e-5)


def test_all_16_bits_is_the_same_policy(policy, index, nearest):
    result = quantize(policy, np.full(len(index), 16), quantizer=nearest, packed=False)
    assert result.fingerprint == policy.fingerprint


def test_uniform_rounds_without_touching_biases(policy, index):
    result = quantize_uniform(policy, 4, packed=False)
    assert not result.quantization["quantizer"]["bias_correction"]
    assert get_module(result.model, LLAMA).bias is None
    np.testing.assert_array_equal(
        rows(result, VISION), on_grid(jnp.asarray(rows(policy, VISION)), 4)
    )
    np.testing.assert_array_equal(
        get_module(result.model, VISION).bias[...], get_module(policy.model, VISION).bias[...]
    )


def broken(policy, value, channel=3):
    graphdef, state = nnx.split(policy.model)
    model = nnx.merge(graphdef, state)
    linear = get_module(model, LLAMA)
    linear.kernel = nnx.Param(linear.kernel[...].at[2, channel].set(value))
    return policy.replace(model=model)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_weights_that_are_not_finite_name_layer_and_channel(policy, index, value, word):
    with pytest.raises(InputError, match=rf"{LLAMA}.*channel 3 hold {word}"):
        quantize(broken(policy, value), np.full(len(index), 4), quantizer=PLAIN)


def test_bad_bits_and_means_are_refused(policy, index, means):
    with pytest.raises(InputError, match=f"expected {len(index)} integers"):
        quantize(policy, np.full(len(index) - 1, 4), quantizer=PLAIN)
    with pytest.raises(InputError, match="have none of"):
        quantize(policy, np.full(len(index), 5), quantizer=PLAIN)
    with pytest.raises(InputError, match="pass statistics"):
        Quantizer(QuantizerSettings(rounding="nearest"))
    wrong = InputStatistics({**means, LLAMA: np.zeros(3)})
    quantizer = Quantizer(QuantizerSettings(rounding="nearest"), wrong)
    with pytest.raises(InputError, match=LLAMA):
        quantize(policy, np.full(len(index), 4), quantizer=quantizer)
    quantizer = Quantizer(QuantizerSettings(), InputStatistics(means))
    with pytest.raises(InputError, match=r"covariances: .* has none"):
        quantize(policy, np.full(len(index), 4), quantizer=quantizer)
    with pytest.raises(InputError, match="quantized already"):
        quantize(quantize_uniform(policy, 8), np.full(len(index), 4), quantizer=PLAIN)


def allocation_of(index, bits, quantizer):
    return Allocation(
        bits=bits, index=index, quantizer=quantizer, sensitivity="jacobian", solver="core",
        budget_bits=16.0, budget_bytes=1, stored_bytes=1, predicted_sse_normalized=0.0,
        lower_bound=0.0, seconds=0.0,
    )  # fmt: skip


def test_an_allocation_is_rounded_by_its_own_quantizer(policy, index, nearest):
    bits = np.random.default_rng(2).choice([0, 2, 4, 8, 16], size=len(index))
    own = quantize(policy, allocation_of(index, bits, nearest), packed=False)
    same = quantize(policy, bits, quantizer=nearest, packed=False)
    assert own.quantization == same.quantization
    assert own.fingerprint == same.fingerprint


def test_bits_that_do_not_say_how_to_round_are_refused(policy, index):
    bits = np.full(len(index), 4)
    with pytest.raises(InputError, match="plain bits do not say how rows are rounded"):
        quantize(policy, bits)
    with pytest.raises(InputError, match="without the input statistics"):
        quantize(policy, allocation_of(index, bits, None))


def test_an_allocation_for_other_layers_is_refused(policy, index):
    first, *others = index.layers
    fewer = ChannelIndex(tuple(others[::-1]))
    wider = ChannelIndex((dataclasses.replace(first, fan_in=first.fan_in + 1), *others))
    for other, message in ((fewer, "another policy"), (wider, rf"\[.*{first.fan_in + 1}\]")):
        allocation = allocation_of(other, np.full(len(other), 4), PLAIN)
        with pytest.raises(InputError, match=message):
            quantize(policy, allocation)
    part = ChannelIndex(tuple(index.layers[:-1]))
    with pytest.raises(InputError, match="the policy has"):
        quantize(policy, allocation_of(part, np.full(len(part), 4), PLAIN))
    with pytest.raises(InputError, match="have none of"):
        allocation_of(index, np.full(len(index), 5), PLAIN)


def test_rules_choose_layers_by_path(policy):
    rules = LayerRules(include=(r"action_head\.", "projector"), exclude=(r".*\.fc2",))
    chosen = quantizable_layers(policy.model, rules)
    assert all(path.startswith(("action_head.", "projector.")) for path in chosen)
    assert not any(path.endswith("fc2") for path in chosen)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (LayerRules(include=("language_modle",)), "include pattern 'language_modle'"),
        (LayerRules(include=(".",), exclude=(r"vision_backbone\.fused_typo",)), "exclude pattern"),
        (LayerRules(include=("projector",), exclude=("projector",)), "nothing to quantize"),
    ],
)
def test_rules_that_decide_nothing_are_refused(policy, rules, message):
    with pytest.raises(InputError, match=message):
        quantizable_layers(policy.model, rules)
