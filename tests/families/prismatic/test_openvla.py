import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax.inference import random_policy

INSTRUCTIONS = [
    "pick up the black bowl next to the plate and place it on the plate",
    "open the drawer",
    "turn on the stove",
]


def observations(count: int = 3, size: int = 32, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, size, size, 3), np.uint8),
        "wrist_image": rng.integers(0, 256, (count, size, size, 3), np.uint8),
        "state": rng.uniform(-1, 1, (count, 8)).astype(np.float32),
        "instruction": [INSTRUCTIONS[i % 3] for i in range(count)],
    }


@pytest.fixture(scope="module")
def policy():
    return random_policy("tiny-test")


def test_one_observation_gives_the_same_chunk_alone_and_in_a_batch(policy):
    batch = observations()
    together = policy.infer_normalized(batch)
    assert together.shape == (3, 8, 7)
    assert together.dtype == np.float32
    for i in range(3):
        alone = {k: v[i : i + 1] for k, v in batch.items()}
        np.testing.assert_allclose(policy.infer_normalized(alone)[0], together[i], atol=2e-5)


def test_prompt_padding_changes_nothing(policy):
    inputs = policy.prepare(observations(1))
    length = int(inputs.prompt_length[0])
    trimmed = dataclasses.replace(inputs, input_ids=inputs.input_ids[:, :length])
    noise = inputs.input_ids.copy()
    noise[:, length:] = 7
    model = jax.jit(policy.model.__call__)
    expected = np.asarray(model(inputs))
    np.testing.assert_allclose(model(trimmed), expected, atol=1e-5)
    np.testing.assert_array_equal(model(dataclasses.replace(inputs, input_ids=noise)), expected)


@pytest.mark.parametrize("key", ["image", "wrist_image", "state", "instruction"])
def test_every_input_reaches_the_action(policy, key):
    batch = observations(1)
    other = dict(batch, **{key: observations(2, seed=1)[key][1:2]})
    change = np.abs(policy.infer_normalized(other) - policy.infer_normalized(batch)).max()
    assert change > 1e-3


def test_cameras_are_not_interchangeable(policy):
    batch = observations(1)
    swapped = dict(batch, image=batch["wrist_image"], wrist_image=batch["image"])
    change = np.abs(policy.infer_normalized(swapped) - policy.infer_normalized(batch)).max()
    assert change > 1e-3


def test_placeholders_are_zeroed_and_the_stop_token_is_embedded():
    policy = random_policy("tiny-test")
    inputs = policy.prepare(observations(1))
    text, valid, _ = policy.model._text_embeddings(inputs)
    length, slots = int(inputs.prompt_length[0]), policy.config.num_action_tokens
    table = np.asarray(policy.model.language_model.model.embed_tokens.embedding[...])
    np.testing.assert_array_equal(text[0, :length], table[inputs.input_ids[0, :length]])
    np.testing.assert_array_equal(text[0, length : length + slots], 0.0)
    np.testing.assert_array_equal(text[0, length + slots], table[policy.config.stop_token_id])
    np.testing.assert_array_equal(np.flatnonzero(valid[0]), np.arange(length + slots + 1))


def test_the_head_reads_from_the_empty_token_on(policy):
    inputs = policy.prepare(observations(1))
    t = policy.config.num_prefix_tokens + inputs.input_ids.shape[1] + 57
    states = jnp.broadcast_to(jnp.arange(t, dtype=jnp.float32)[None, :, None], (1, t, 32))
    read = policy.model.action_states(states, jnp.asarray(inputs.prompt_length))
    first = policy.config.num_prefix_tokens + int(inputs.prompt_length[0]) - 1
    np.testing.assert_array_equal(read[0, :, 0], np.arange(first, first + 56))
