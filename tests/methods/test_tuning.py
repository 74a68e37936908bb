"""Tuning of scales and biases on the action error."""

import dataclasses

import jax
import numpy as np
import pytest

from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods.tuning import tune
from qvla_jax.quantization import NEAREST_UNCORRECTED, LayerRules, Quantizer

RULES = LayerRules(
    include=(
        r"language_model\.model\.layers\.0\.self_attn\.[qkv]_proj",
        r"vision_backbone\.featurizer\.blocks\.0\.attn\.proj",
    )
)


@pytest.fixture(scope="module")
def packed(policy):
    """All widths; activations of 8 bits in one layer."""
    index = policy_index(policy, RULES)
    bits = np.random.default_rng(0).choice([0, 2, 3, 4, 16], len(index))
    made = quantize(policy, bits, quantizer=Quantizer(NEAREST_UNCORRECTED), rules=RULES)
    next(iter(packed_layers(made.model).values())).activation_bits = 8
    return dataclasses.replace(made, quantization={"method": "drawn"})


@pytest.fixture(scope="module")
def tuned(policy, packed, calibration):
    return tune(policy, packed, calibration, epochs=6, rate=1e-2)


def test_codes_and_bytes_stay(packed, tuned):
    before, after = packed_layers(packed.model), packed_layers(tuned.model)
    assert before.keys() == after.keys()
    changed = 0
    for path, layer in before.items():
        old, new = layer.weight, after[path].weight
        assert old.nbytes == new.nbytes
        assert after[path].inputs.activation_bits == layer.inputs.activation_bits
        jax.tree.map(np.testing.assert_array_equal, old.words, new.words)
        np.testing.assert_array_equal(old.bits(), new.bits())
        changed += sum(
            (np.asarray(a) != np.asarray(b)).any()
            for a, b in zip(old.scales, new.scales, strict=True)
        )
    assert changed


def test_errors_are_those_of_the_policies_on_the_frames_that_are_held_back(
    policy, packed, tuned, calibration
):
    # 5 frames: batches of 2, of which the second is held back.
    _, batch, _ = calibration.batches(2)
    expected = policy.infer_normalized(batch)
    errors = tuned.quantization["tuning errors"]
    assert len(errors) == 7
    for candidate, error in ((packed, errors[0]), (tuned, min(errors))):
        found = unpacked(policy, candidate).infer_normalized(batch)
        np.testing.assert_allclose(np.mean((found - expected) ** 2), error, rtol=1e-2)
    assert min(errors) < 0.9 * errors[0]


def test_without_a_better_epoch_nothing_changes(policy, packed, calibration):
    same = tune(policy, packed, calibration, epochs=0)
    for path, layer in packed_layers(packed.model).items():
        own = packed_layers(same.model)[path].weight
        jax.tree.map(np.testing.assert_array_equal, layer.weight.scales, own.scales)
        jax.tree.map(np.testing.assert_array_equal, layer.weight.bias, own.bias)
