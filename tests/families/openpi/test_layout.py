"""The layout of pi0 and pi0.5 against their networks."""

import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.openpi.layout import layout
from qvla_jax.families.openpi.network import abstract_model
from qvla_jax.models import named_modules
from qvla_jax.quantization import quantizable_layers

EXPERT = re.compile(r"PaliGemma\.llm\.layers\.\d+\.(attn\.\w+_einsum_1|mlp_1\.\w+)")


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_every_linear_layer_is_quantized_or_kept(configs, variant):
    model, own = abstract_model(configs[variant]), layout(configs[variant])
    quantized = quantizable_layers(model, own.rules)
    kept = {
        path
        for path in named_modules(model, nnx.Linear)
        if any(re.match(pattern, path) for pattern in own.kept)
    }
    assert set(named_modules(model, nnx.Linear)) == set(quantized) | kept
    assert not set(quantized) & kept
    assert "PaliGemma.img.embedding" in quantized
    assert {"PaliGemma.img.head", "action_in_proj", "action_out_proj"} <= kept
    # The expert's and the language model's: four projections and three of the MLP in every layer.
    assert sum(bool(EXPERT.fullmatch(path)) for path in quantized) == 7 * 2
    assert sum(path.startswith("PaliGemma.llm.") for path in quantized) == 2 * 7 * 2
    for pattern in (*own.stages, *own.parts):
        assert any(re.fullmatch(pattern, path) for path in named_modules(model, nnx.Module))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_names_and_entries(configs, variant):
    own = layout(configs[variant])
    up = "PaliGemma.llm.layers.1.mlp_1.up"
    query = "PaliGemma.img.Transformer.encoderblock.0.MultiHeadDotProductAttention_0.query"
    assert own.module_type(up) == "llm.mlp_1.up"
    assert own.module_type(query) == "img.Transformer.MultiHeadDotProductAttention_0.query"
    assert own.short_name(up) == "llm 1.mlp_1.up"
    assert own.short_name(query) == "siglip 0.attn.query"
    assert own.group(up) == "PaliGemma.llm"
    assert own.group("action_in_proj") == "action_in_proj"
    # LIBERO's: seven of nine entries here, the gripper last.
    assert own.action_entries == tuple(range(7))
    assert own.grippers == (6,)
    assert own.action_weights({6: 10.0}, 9) == (1, 1, 1, 1, 1, 1, 10, 0, 0)


def test_the_first_actions_are_executed(configs):
    config = configs["pi05"]
    assert config.executed_steps == 5 > config.action_horizon
    assert layout(config).executed_steps is None  # all of a chunk that is as short
    chunks = np.arange(2 * 3 * 9).reshape(2, 3, 9)
    np.testing.assert_array_equal(layout(config).executed(chunks), chunks[..., :7])
    two = layout(dataclasses.replace(config, executed_steps=2))
    np.testing.assert_array_equal(two.executed(chunks), chunks[:, :2, :7])
