"""The layout of Prismatic networks against the networks themselves."""

import dataclasses
import re

import jax
import pytest
from flax import nnx

from qvla_jax.families.prismatic.config import LatentActionConfig, OpenVLAConfig, preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import abstract_model
from qvla_jax.families.prismatic.specs import inputs_spec
from qvla_jax.models import named_modules
from qvla_jax.models.surgery import replace_modules
from qvla_jax.quantization import quantizable_layers


def configurations() -> dict[str, OpenVLAConfig]:
    """One of each way to decode, with towers as the public ones: more blocks than are read."""
    small = preset("tiny-test")
    first, second = (
        dataclasses.replace(tower, depth=2, feature_block=0, final_norm=True)
        for tower in small.vision
    )
    second = dataclasses.replace(second, attention_pool=True)
    l1 = dataclasses.replace(small, vision=(first, second))
    one = dict(action_horizon=1, proprio_dim=0, num_images=1)
    latent = LatentActionConfig(embed_dim=16, num_heads=2, mlp_dim=24)
    return {
        "l1": l1,
        "tokens": dataclasses.replace(l1, decoding="tokens", **one),
        "latents": dataclasses.replace(l1, decoding="latents", latent_action=latent, **one),
    }


CONFIGS = configurations()


@pytest.mark.parametrize("decoding", CONFIGS)
def test_every_linear_layer_is_quantized_or_kept(decoding):
    model, own = abstract_model(CONFIGS[decoding]), layout(CONFIGS[decoding])
    quantized = set(quantizable_layers(model, own.rules))
    linears = set(named_modules(model, nnx.Linear))
    kept = {path for path in linears if any(re.match(pattern, path) for pattern in own.kept)}
    assert quantized | kept == linears
    assert not quantized & kept
    modules = named_modules(model, nnx.Module)
    for pattern in own.stages[:2] + own.parts:
        assert any(re.fullmatch(pattern, path) for path in modules)


@pytest.mark.parametrize("decoding", CONFIGS)
def test_a_call_reads_each_layer_as_often_as_the_layout_says(decoding):
    """Counts the calls of every linear layer in one call of the policy, which is only traced."""
    config = CONFIGS[decoding]
    own, model = layout(config), abstract_model(config)
    calls = dict.fromkeys(named_modules(model, nnx.Linear), 0)

    class Counted(nnx.Module):
        def __init__(self, inner, path):
            self.inner, self.path = inner, path

        def __call__(self, x):
            calls[self.path] += 1
            return self.inner(x)

    graphdef, state = nnx.split(model)

    def run(state, inputs):
        copy = nnx.merge(graphdef, state)
        layers = named_modules(copy, nnx.Linear)
        replace_modules(copy, {path: Counted(layers[path], path) for path in layers})
        return copy.actions(inputs)

    jax.eval_shape(run, state, inputs_spec(config))
    assert calls == {path: own.reads_of(path) for path in calls}


def test_names():
    own = layout(CONFIGS["l1"])
    up, qkv = "language_model.model.layers.3.mlp.up_proj", "vision_backbone.featurizer.blocks.0.qkv"
    assert own.module_type(up) == "language_model.mlp.up_proj"
    assert own.module_type(qkv) == "featurizer.qkv"
    assert own.short_name(up) == "llm 3.mlp.up_proj"
    assert own.short_name(qkv) == "dino 0.qkv"
    assert own.group(qkv) == "vision_backbone.featurizer"
    assert own.group("projector.fc1") == "projector"
    assert own.grippers == (6,)
    assert own.action_weights({6: 10}, 7) == (1, 1, 1, 1, 1, 1, 10)
