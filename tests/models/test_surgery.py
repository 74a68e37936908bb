import pytest
from flax import nnx

from qvla_jax.inference import random_policy
from qvla_jax.models import get_module, named_modules, replace_modules
from qvla_jax.models.linear import Linear


@pytest.fixture(scope="module")
def model():
    return random_policy("tiny-test").model


def test_paths_are_the_public_ones_and_lead_back_to_their_modules(model):
    layers = named_modules(model, Linear)
    for expected in (
        "vision_backbone.featurizer.patch_embed.proj",
        "vision_backbone.fused_featurizer.blocks.1.attn.qkv",
        "projector.fc3",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.lm_head",
        "proprio_projector.fc1",
        "action_head.model.mlp_resnet_blocks.1.ffn.1",
    ):
        assert layers[expected] is get_module(model, expected)


def test_indices_are_ordered_as_numbers():
    stack = nnx.List([Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(12)])
    assert list(named_modules(stack, Linear)) == [str(i) for i in range(12)]


def test_replacing_puts_the_new_module_in_place():
    model = random_policy("tiny-test").model
    paths = [
        "language_model.model.layers.1.mlp.up_proj",
        "action_head.model.mlp_resnet_blocks.0.ffn.1",
    ]
    new = {path: Linear(1, 1, rngs=nnx.Rngs(0)) for path in paths}
    replace_modules(model, new)
    assert all(get_module(model, path) is new[path] for path in paths)


def test_unknown_paths_name_the_part_that_is_missing(model):
    with pytest.raises(KeyError, match=r"'layers\.7\.mlp'.*'7' was not found"):
        get_module(model.language_model.model, "layers.7.mlp")
