"""`inputs_spec` and `fake_observation` of every kind of policy."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.config import OpenVLAConfig, preset
from qvla_jax.families.prismatic.network import abstract_model, make_model
from qvla_jax.families.prismatic.specs import inputs_spec, observation_spec
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference import load_policy
from qvla_jax.inference.policy import Policy, make_policy

UNIT = {
    "x": {
        block: {"q01": [-1.0] * size, "q99": [1.0] * size}
        for block, size in (("action", 7), ("proprio", 8))
    }
}


def _policy(**changes) -> Policy:
    config = dataclasses.replace(preset("tiny-test"), unnorm_key="x", **changes)
    model = make_model(config, rngs=nnx.Rngs(0))
    return make_policy(config, model, word_files(), UNIT, source="test")


def _tokens() -> dict:
    text = dataclasses.replace(preset("tiny-test").text, vocab_size=384)
    return {
        "decoding": "tokens", "text": text, "action_vocab_size": 320, "action_horizon": 1,
        "num_images": 1, "proprio_dim": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_images": 1, "proprio_dim": 0},
        {"image_chain": "openvla", "center_crop": True, "use_film": True},
        _tokens(),
    ],
    ids=["OFT", "OFT, one camera", "OFT, FiLM and the reference's chain", "OpenVLA"],
)
def test_a_fake_observation_is_all_that_infer_asks_for(changes):
    policy = _policy(**changes)
    observation = policy.fake_observation(seed=3)
    chunk = policy.infer(observation)
    assert chunk.shape == (policy.config.action_horizon, 7)
    assert np.isfinite(chunk).all()
    for key in observation:
        with pytest.raises(InputError, match=f"no '{key}'"):
            policy.infer({k: v for k, v in observation.items() if k != key})


@pytest.mark.parametrize("changes", [{}, {"num_images": 1, "proprio_dim": 0}, _tokens()])
def test_the_spec_is_that_of_prepared_observations(changes):
    policy = _policy(**changes)
    observations = [policy.fake_observation(seed) for seed in range(3)]
    inputs = policy.prepare({k: [o[k] for o in observations] for k in observations[0]})
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
    assert described == policy.inputs_spec(3)


def test_libero_mini_has_the_same_interface():
    policy = load_policy("libero-mini")
    assert policy.infer(policy.fake_observation()).shape == (8, 7)


def _chunk(config: OpenVLAConfig) -> jax.ShapeDtypeStruct:
    # Full widths; two layers of each kind say as much about shapes as all of them.
    first, second = (
        dataclasses.replace(tower, depth=2, feature_block=0) for tower in config.vision
    )
    text = dataclasses.replace(config.text, num_hidden_layers=2)
    config = dataclasses.replace(config, vision=(first, second), text=text)
    graphdef, state = nnx.split(abstract_model(config))
    return jax.eval_shape(
        lambda state, inputs: nnx.merge(graphdef, state).actions(inputs),
        state,
        inputs_spec(config, batch_size=2),
    )


@pytest.mark.parametrize(
    ("name", "horizon"), [("openvla-7b", 1), ("openvla-oft-7b", 8), ("libero-mini", 8)]
)
def test_presets_run_abstractly_on_the_spec(name, horizon):
    assert _chunk(preset(name)).shape == (2, horizon, 7)


def test_noise_follows_the_seed():
    config = preset("openvla-oft-7b")
    first, again, other = (observation_spec(config).fake(s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert (first["image"] != other["image"]).any()
    assert first["image"].shape == (256, 256, 3)
