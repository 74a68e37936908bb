"""Packed pi0.5: what one call of the policy computes."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.inference.unpacking import unpacked

EXPERT = "PaliGemma.llm.layers.1"


@pytest.fixture(scope="module")
def policy(policies):
    return policies["pi05"]


@pytest.fixture(scope="module")
def packed(policy):
    return quantize_uniform(policy, 4)


@pytest.fixture(scope="module")
def program(packed):
    """One call of the policy, compiled."""
    graphdef, state = nnx.split(packed.model)
    observation = {
        k: [v] if isinstance(v, str) else v[None] for k, v in packed.fake_observation().items()
    }
    run = jax.jit(lambda state, *given: nnx.merge(graphdef, state).actions(*given))
    return run.lower(state, packed.prepare(observation), packed.conditioning).compile().as_text()


def test_layers_with_the_same_input_hold_one_weight(packed):
    layers = packed_layers(packed.model)
    for names in (
        ("attn.q_einsum", "attn.k_einsum", "attn.v_einsum"),
        ("attn.q_einsum_1", "attn.k_einsum_1", "attn.v_einsum_1"),
        ("mlp.gate", "mlp.up"),
        ("mlp_1.gate", "mlp_1.up"),
    ):
        assert len({id(layers[f"{EXPERT}.{name}"].arrays) for name in names}) == 1, names


def test_every_weight_is_read_once_a_step_and_the_prefix_is_not_copied(program, packed):
    config = packed.config
    body = steps_of(program)
    products = re.compile(r'custom_call_target="qvla_matmul"')
    if not products.search(program):
        pytest.skip("no native kernel")
    # q, k and v; the output; gate and up; down.
    assert len(products.findall(body)) == 4 * config.action_expert.depth
    tower = 1 + 4 * config.vision.depth
    # Of the last layer, the prefix's keys and values alone.
    prefix = 4 * (config.language.depth - 1) + 1
    assert len(products.findall(program)) == tower + prefix + 4 * config.action_expert.depth
    places = config.vision.num_patches * 2 + config.max_prompt_tokens
    shape = rf"1,{config.language.num_kv_heads},(?:\d+,{places}|{places},\d+)"
    found = set(re.findall(rf"= f32\[{shape}\]\S* ([\w\-]+)\(", body))
    assert "get-tuple-element" in found  # of what the loop carries
    assert found <= {"get-tuple-element", "bitcast"}


def steps_of(program: str) -> str:
    """The body of the loop over the steps."""
    (name,) = re.findall(r" while\(.*body=%?([\w.\-]+)", program)
    start = program.index(f"\n%{name} (")
    return program[start : program.index("\n}\n", start)]


def test_actions_are_those_of_the_dequantized_values(policy, packed):
    observation = policy.fake_observation(3)
    found = packed.infer(observation, seed=4)
    expected = unpacked(policy, packed).infer(observation, seed=4)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
