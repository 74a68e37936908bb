"""The token policy: expectations behind decoded tokens, each layer called once."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.data.calibration import calibration_set
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference.policy import make_policy
from qvla_jax.sensitivity import sensitivities, validate


@pytest.fixture(scope="module")
def policy():
    small = preset("tiny-test")
    config = dataclasses.replace(
        small,
        decoding="tokens",
        text=dataclasses.replace(small.text, vocab_size=320, num_hidden_layers=1),
        action_vocab_size=320,
        action_horizon=1,
        proprio_dim=0,
        num_images=1,
        unnorm_key="x",
    )
    model = make_model(config, rngs=nnx.Rngs(0))
    # Random output layers give nearly uniform bins: sharper ones make actions that differ.
    head = model.language_model.lm_head.kernel
    head[...] = head[...] * 4.0
    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    return make_policy(config, model, word_files(), {"x": {"action": action}}, source="x")


@pytest.fixture(scope="module")
def frames():
    return calibration_set("bundled", frames=4, horizon=1)


@pytest.fixture(scope="module")
def inputs(policy, frames):
    return policy.prepare(next(frames.batches(4)))


@pytest.fixture(scope="module")
def model(policy):
    return jax.jit(policy.model.__call__)


def test_completed_inputs_give_the_same_action(policy, model, inputs):
    completed = policy.complete(inputs)
    tokens = np.asarray(completed.action_tokens)
    np.testing.assert_array_equal(tokens, jax.jit(policy.model.decode)(inputs))
    np.testing.assert_allclose(model(completed), model(inputs), atol=1e-5)
    assert policy.model.complete(completed) is completed


def test_other_tokens_give_another_action(policy, model, inputs):
    completed = policy.complete(inputs)
    tokens = np.roll(np.asarray(completed.action_tokens), 1, axis=1)
    other = dataclasses.replace(completed, action_tokens=tokens)
    assert np.abs(model(other) - model(completed)).max() > 1e-4


@pytest.mark.long
def test_jacobian_ranks_as_exact_probing(policy, frames):
    table = sensitivities(policy, frames, bits=(0, 4, 16), probes="full", joint=False)
    assert np.isfinite(table.costs).all()
    assert (table.costs[:, 2] == 0).all()
    ranks = validate(policy, frames, table, channels=48, frames=4).spearman
    assert {r.bits: r.spearman > 0.9 for r in ranks} == {0: True, 4: True}
