"""Activation bits of layers under a budget of work."""

import itertools

import numpy as np
import pytest

from qvla_jax.errors import BudgetError
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods.activations import allocate_activations
from qvla_jax.quantization import NEAREST_UNCORRECTED, LayerRules, Quantizer

ATTENTION = "language_model.model.layers.0.self_attn."
QKV = tuple(f"{ATTENTION}{name}_proj" for name in "qkv")
VISION = "vision_backbone.featurizer.blocks.0.attn.proj"
FORWARD = "language_model.model.layers.1.mlp.down_proj"
GROUPS = (QKV, (VISION,), (FORWARD,))
RULES = LayerRules(include=(r".*layers\.0\.self_attn\.[qkv]_proj", VISION, FORWARD))
OPTIONS = (16, 8, 4)


@pytest.fixture(scope="module")
def packed(policy):
    bits = np.random.default_rng(0).choice([0, 2, 4, 8], len(policy_index(policy, RULES)))
    return quantize(policy, bits, quantizer=Quantizer(NEAREST_UNCORRECTED), rules=RULES)


@pytest.fixture(scope="module")
def costs(policy, packed, calibration):
    """Through the public path: packed policies with other activation bits, run on all frames."""
    (batch,) = calibration.batches(5)
    layers = packed_layers(packed.model)

    def actions(chosen):
        for path, layer in layers.items():
            layer.activation_bits = chosen.get(path, 16)
        found = unpacked(policy, packed, rounding=True).infer_normalized(batch)
        for layer in layers.values():
            layer.activation_bits = 16
        return found.astype(np.float64)

    exact = actions({})
    return {
        (group, bits): np.square(actions(dict.fromkeys(group, bits)) - exact).sum() / 5
        for group in GROUPS
        for bits in OPTIONS
    }


# Multiplications for a frame, rows of the inputs times entries of the weights: 24 tokens of the
# prompt, 8 patches, proprio, 56 placeholders and the stop token; 9 tokens for each camera.
TOKENS = 24 + 8 + 1 + 56 + 1
WORK = {QKV: TOKENS * 3 * 32 * 32, (VISION,): 2 * 9 * 16 * 16, (FORWARD,): TOKENS * 32 * 48}


@pytest.mark.parametrize("budget", [4.5, 6.0, 9.0, 15.0])
def test_the_choice_is_the_best_of_all(policy, packed, calibration, costs, budget):
    found = allocate_activations(policy, packed, calibration, budget)
    assert set(found) == {path for group in GROUPS for path in group}
    assert len({found[path] for path in QKV}) == 1

    def cost(choice):
        return sum(costs[group, bits] for group, bits in zip(GROUPS, choice, strict=True))

    def average(choice):
        of_groups = zip(GROUPS, choice, strict=True)
        return sum(WORK[group] * bits for group, bits in of_groups) / sum(WORK.values())

    within = [c for c in itertools.product(OPTIONS, repeat=len(GROUPS)) if average(c) <= budget]
    chosen = tuple(found[group[0]] for group in GROUPS)
    assert chosen in within
    assert cost(chosen) == pytest.approx(min(map(cost, within)), rel=1e-4)


def test_less_than_four_bits_are_refused(policy, packed, calibration):
    with pytest.raises(BudgetError):
        allocate_activations(policy, packed, calibration, 3.9)
