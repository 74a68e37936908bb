"""Every stage of the public policies against what the public PyTorch code computed."""

import dataclasses

import jax
import numpy as np
import pytest

from qvla_jax.families.prismatic.network import ModelInputs

from .reference import RELATIVE, recording
from .trim import PLACES_STEP

OFT = ("openvla_oft_tiny", "openvla_oft_film_tiny")
AUTOREGRESSIVE = ("openvla_tiny", "openvla_realvocab_bf16")
VARIANTS = (*AUTOREGRESSIVE, *OFT)
# Not outputs of a module: compared in tests of their own.
_OTHERWISE = (
    "model_image", "pixel_values", "ids", "mask", "proprio_raw", "proprio_normalized", "generated",
    "normalized_action", "libero_env", "get_vla", "discrete", "hidden_start", "sample", "train_",
    "plain_", "film_language", "top16",
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recorded_stage_is_matched(references, name):
    reference, policy, found = references(name)
    wide = policy.config.vision[0].num_patches > 200
    compared = []
    for stage, recorded in reference.arrays.items():
        if any(word in stage for word in _OTHERWISE):
            continue
        if stage.endswith("block2"):  # computed by the reference, read by nobody
            continue
        value = found[stage]
        if (
            wide
            and value.shape != recorded.shape
            and stage.startswith(("dino", "sig", "fus", "pro"))
        ):
            value = value[:, ::PLACES_STEP]
        if stage == "logits_step0":
            value = value[-len(recorded) :]
        assert value.shape == recorded.shape, stage
        assert np.abs(value - recorded).max() <= reference.tolerance(stage), stage
        compared.append(stage)
    assert len(compared) >= 18, compared


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_those_of_the_reference(references, name):
    reference, policy, _ = references(name)
    arrays = reference.arrays
    for number, sample in enumerate(reference.meta["samples"]):
        if not sample["task"]:
            continue
        prefix = f"sample{number}_" if number else ""
        expected = arrays[f"{prefix}input_ids"][0]
        empty = reference.meta["empty_token_id"]
        if expected[-1] != empty:
            expected = np.append(expected, empty)
        ids, length = policy.processor.tokenize([sample["task"]])
        np.testing.assert_array_equal(ids[0, : length[0]], expected)
        assert (ids[0, length[0] :] == reference.meta["pad_token_id"]).all()
        with_empty = arrays.get(f"{prefix}input_ids_with_empty_token")
        if with_empty is not None:
            np.testing.assert_array_equal(with_empty[0], expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_pixels_are_those_of_the_reference(references, name):
    reference, _, found = references(name)
    if "pixel_values" not in reference.arrays:
        pytest.skip("left out of the record for its size; fused_patch_features depend on it")
    recorded = reference.arrays["pixel_values"][0]
    cameras = recorded.reshape(-1, 2, 3, *recorded.shape[1:])
    for half, tower in enumerate(("dino", "siglip")):
        pixels = np.moveaxis(found[f"{tower}_pixels"], -1, 1)
        np.testing.assert_allclose(pixels, cameras[:, half], atol=1e-6)


@pytest.mark.parametrize("name", OFT)
def test_oft_acts_as_the_reference(references, name):
    reference, policy, found = references(name)
    for number in range(len(reference.meta["samples"])):
        prefix = f"sample{number}_" if number else ""
        observation = reference.observation(number)
        chunk = policy.infer(observation, preprocessed=True)
        recorded = reference.arrays[f"{prefix}unnormalized_actions"]
        np.testing.assert_allclose(chunk, recorded, atol=1e-4, rtol=0)
        normalized = policy.run(reference.inputs(policy, number))[0]
        expected = reference.arrays[f"{prefix}normalized_actions"]
        np.testing.assert_allclose(normalized, expected, atol=1e-4, rtol=0)
        proprio = policy.processor.proprio.normalize(observation["state"])
        expected = reference.arrays[f"{prefix}proprio_normalized"]
        np.testing.assert_allclose(proprio, expected, atol=1e-6)
    start = policy.config.num_prefix_tokens + len(reference.arrays["input_ids"][0])
    assert start == reference.arrays["actions_hidden_start"]
    # Without the head the reference reads a token off every state.
    head = policy.model.language_model.lm_head
    tokens = np.argmax(np.asarray(head(found["actions_hidden_states"])), axis=-1)[0]
    np.testing.assert_array_equal(tokens, reference.arrays["discrete_token_ids"])


@pytest.mark.parametrize("name", OFT)
def test_a_batch_of_prompts_of_different_lengths_matches_the_training_forward(references, name):
    reference, policy, _ = references(name)
    first, second = (reference.inputs(policy, i) for i in range(2))
    both = ModelInputs(
        images=np.concatenate([first.images, second.images]),
        input_ids=np.concatenate([first.input_ids, second.input_ids]),
        prompt_length=np.concatenate([first.prompt_length, second.prompt_length]),
        proprio=reference.arrays["train_batch_proprio"],
    )
    assert both.prompt_length[0] != both.prompt_length[1]
    recorded = reference.arrays["train_batch_predicted_actions"]
    if policy.config.use_film:
        # The reference's training forward takes FiLM's mean over the padding as well, which
        # inference never has: only the longer prompt can be compared.
        longer = int(np.argmax(both.prompt_length))
        actions = policy.run(both)[longer]
        np.testing.assert_allclose(actions, recorded[longer], atol=1e-4, rtol=0)
        return
    np.testing.assert_allclose(policy.run(both), recorded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_openvla_decodes_the_tokens_of_the_reference(references, name):
    reference, policy, found = references(name)
    np.testing.assert_array_equal(found["action_token_ids"], reference.arrays["action_token_ids"])
    for number in range(len(reference.meta["samples"])):
        prefix = f"sample{number}_" if number else ""
        inputs = reference.inputs(policy, number)
        normalized = policy.run(inputs)[0, 0]
        expected = reference.arrays[f"{prefix}normalized_action"]
        np.testing.assert_allclose(normalized, expected, atol=1e-6)  # equal bins
        action = policy.unnormalize_actions(normalized)
        expected = reference.arrays[f"{prefix}unnormalized_action"]
        np.testing.assert_allclose(action, expected, atol=1e-4, rtol=0)
        if reference.meta["samples"][number]["task"]:
            observation = reference.observation(number)
            through_infer = policy.infer(observation, preprocessed=True)[0]
            np.testing.assert_allclose(through_infer, expected, atol=1e-4, rtol=0)


def test_the_forward_pass_without_empty_token_matches(references):
    reference, policy, _ = references("openvla_tiny")
    arrays = reference.arrays
    inputs = reference.inputs(policy)
    length = arrays["plain_forward_input_ids"].shape[1]
    assert inputs.prompt_length[0] == length + 1
    short = dataclasses.replace(inputs, prompt_length=inputs.prompt_length - 1)
    with jax.default_matmul_precision("float32"), recording(policy.model) as calls:
        logits = policy.model.roll_out(short).logits[0, 0]
    recorded = arrays["plain_forward_logits_last"][0]
    assert np.abs(logits - recorded).max() <= RELATIVE * np.sqrt(np.mean(recorded**2))
    places = policy.config.num_prefix_tokens + length
    states = calls["language_model.model"][0][:, :places:PLACES_STEP]
    recorded = arrays["plain_forward_hidden_states_3"]
    assert np.abs(states - recorded).max() <= RELATIVE * np.sqrt(np.mean(recorded**2))
