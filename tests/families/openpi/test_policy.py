"""pi0 and pi0.5 as residents: one door for public directories, ours and packed files."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax.checkpoints import public_tensors
from qvla_jax.data.libero.environment import libero_action
from qvla_jax.data.statistics import ArrayStatistics
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.evaluation import predict
from qvla_jax.inference import import_policy, load_policy
from qvla_jax.inference.dequantizing import dequantized
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.report.modules import describe

ASSET = "physical-intelligence/libero"
VARIANTS = ("pi0", "pi05")


@pytest.fixture(scope="module")
def policy(policies):
    return policies["pi0"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_public_directory_becomes_a_policy(policies, variant):
    policy = policies[variant]
    assert policy.family.name == "openpi"
    assert set(policy.statistics) == {ASSET}
    observation = policy.fake_observation()
    assert set(observation) == {"image", "wrist_image", "state", "instruction"}
    chunk = policy.infer(observation)
    assert chunk.shape == (3, 7)
    np.testing.assert_array_equal(policy.infer(observation, seed=0), chunk)
    assert np.abs(policy.infer(observation, seed=1) - chunk).max() > 1e-4
    noise = policy.processor.noise([1])[0]
    np.testing.assert_array_equal(
        policy.infer(observation, noise=noise), policy.infer(observation, seed=1)
    )


def test_the_noise_of_a_frame_does_not_depend_on_its_batch(policy):
    observations = [policy.fake_observation(i) for i in range(3)]
    batch = {key: [o[key] for o in observations] for key in observations[0]}
    together = policy.infer_normalized(batch | {"seed": np.array([5, 6, 5])})
    for i, seed in enumerate((5, 6, 5)):
        alone = policy.infer(observations[i], seed=seed)
        metric = policy.unnormalize_actions(together[i : i + 1], observations[i]["state"][None])
        np.testing.assert_allclose(metric[0], alone, atol=1e-4)


def test_grippers_of_libero_have_the_sign_of_its_controller(policies):
    """openpi's LIBERO data hold raw commands, and so do the actions of its policies."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(-1, 1, (4, 3, 7))
    raw[..., 6] = rng.choice([-1, 1], (4, 3))
    policy, state = policies["pi05"], np.zeros((4, 8))
    processor = policy.processor
    standard = processor.from_robot(raw)
    np.testing.assert_array_equal(processor.to_robot(standard), raw)
    np.testing.assert_array_equal(standard[..., :6], raw[..., :6])
    # What a closed loop executes.
    for command, action in zip(raw.reshape(-1, 7), standard.reshape(-1, 7), strict=True):
        np.testing.assert_array_equal(libero_action(action), command)
    normalized = policy.normalize_standard(standard, state)
    np.testing.assert_array_equal(normalized, policy.normalize_actions(raw, state))
    np.testing.assert_allclose(policy.standard_actions(normalized, state), standard, atol=1e-6)
    found, expected = (ArrayStatistics.of(x.reshape(-1, 7)).to_json() for x in (standard, raw))
    public = policy.family.public_statistics(policy.config, {"set": {"action": found}})
    for key, values in public["set"]["norm_stats"]["actions"].items():
        np.testing.assert_allclose(values, expected[key], atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flips_are_those_of_the_commands_that_the_robot_gets(policies, variant):
    """By z-scores and by quantiles: a flip is a change of the raw command's sign."""
    policy, rng, frames = policies[variant], np.random.default_rng(1), 20
    raw, other = rng.uniform(-1, 1, (2, frames, 3, 7))
    batch = {"actions": policy.processor.from_robot(raw), "state": np.zeros((frames, 8))}
    acting = SimpleNamespace(
        layout=policy.layout,
        infer_normalized=lambda batch: policy.normalize_actions(other, batch["state"]),
        normalize_standard=policy.normalize_standard,
    )
    found = predict(acting, SimpleNamespace(frames=frames, batches=lambda _: [batch]))
    flips = ((raw[..., 6] > 0) != (other[..., 6] > 0))[:, : policy.layout.executed_steps]
    assert found.errors(found.expert).gripper_flips == flips.sum()


def test_actions_are_relative_to_the_state(policy):
    chunk = np.random.default_rng(0).normal(size=(2, 3, 7))
    state = np.linspace(-1, 1, 16).reshape(2, 8)
    normalized = policy.normalize_actions(chunk, state)
    assert normalized.shape == (2, 3, 9)
    np.testing.assert_array_equal(normalized[..., 7:], 0)
    np.testing.assert_allclose(policy.unnormalize_actions(normalized, state), chunk, atol=1e-5)
    with pytest.raises(InputError, match="its actions are relative to the state"):
        policy.unnormalize_actions(normalized)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_imported_or_exported_is_the_same_policy(
    policies, published, tokenizer, tmp_path, variant
):
    policy = policies[variant]
    policy.save(tmp_path / "saved")
    options = {"preset": f"{variant}_libero", "tokenizer": tokenizer}
    import_policy(published[variant], tmp_path / "imported", dtype=np.float32, **options)
    policy.export(tmp_path / "exported")
    for name in ("saved", "imported", "exported"):  # which need no options any more
        again = load_policy(tmp_path / name)
        assert again.fingerprint == policy.fingerprint, name
        assert again.config == policy.config
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert content["family"] == "openpi"


def test_a_packed_policy_is_one_file(policy, tmp_path):
    packed = quantize_uniform(policy, 8)
    packed.save(tmp_path / "eight.qvla")
    again = load_policy(tmp_path / "eight.qvla")
    assert again.fingerprint == packed.fingerprint
    observation = policy.fake_observation()
    np.testing.assert_array_equal(again.infer(observation), packed.infer(observation))
    assert (again.infer(observation) != policy.infer(observation)).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rounded_weights_of_a_packed_policy_are_exported(policies, tmp_path, variant):
    packed = quantize_uniform(policies[variant], 8)
    expected = public_tensors(dequantized(packed).policy.model)
    dequantized(packed, dtype=jnp.bfloat16).policy.export(tmp_path / "out")
    for name, tensor in public_tensors(load_policy(tmp_path / "out").model).items():
        np.testing.assert_array_equal(tensor, expected[name].astype(jnp.bfloat16))
    packed.family.drop_unread(packed.model)  # as large policies are packed
    if variant == "pi05":
        with pytest.raises(InputError, match="no room for 'modulations', which took the place of"):
            dequantized(packed)
        return
    found = dequantized(packed)
    assert any("final_norm" in name for name in found.unread)
    for name, tensor in public_tensors(found.policy.model).items():
        unread = name.rpartition(".")[0] in {name.rpartition(".")[0] for name in found.unread}
        np.testing.assert_array_equal(tensor, 0 if unread else expected[name], err_msg=name)


def test_a_directory_is_described_without_options(published, configs):
    found = describe(str(published["pi05"]))
    assert found.config.action_expert == configs["pi05"].action_expert
    assert found.parameters == sum(module.parameters for module in found.modules)
    assert {module.part for module in found.modules} >= {"PaliGemma.img", "PaliGemma.llm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "preset=.*one of: pi0_base"),
        ({"preset": "pi0_libero"}, "come without their tokenizer; name its file with tokenizer="),
        ({"preset": "pi0_libero", "num_images": 2}, "num_images: pi0 and pi0.5 policies do not"),
        ({"preset": "pi0_libero", "unnorm_key": "x"}, "name one with unnorm_key=.*there are: phys"),
        ({"preset": "pi0_libero", "executed_steps": 4}, "executed_steps=4: a chunk .* has 3 actio"),
        ({"preset": "pi0_base"}, "which statistics are used is told by no file"),
    ],
)
def test_what_a_public_directory_needs_is_asked_for(published, options, message):
    with pytest.raises((CheckpointError, InputError), match=message):
        load_policy(published["pi0"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "pi0_droid"}, "preset='pi0_droid' contradicts the recorded 'pi0_libero'"),
        ({"tokenizer": "t.json"}, "tokenizer: only public directories come without one"),
        ({"center_crop": True}, "center_crop: pi0 and pi0.5 policies do not take it"),
        ({"unnorm_key": "x"}, "unknown statistics 'x'"),
    ],
)
def test_what_is_recorded_is_not_contradicted(policy, tmp_path, options, message):
    policy.save(tmp_path / "saved")
    with pytest.raises(InputError, match=message):
        load_policy(tmp_path / "saved", **options)
    assert load_policy(tmp_path / "saved", preset="pi0_libero", unnorm_key=ASSET).config


def test_the_steps_that_a_client_executes_may_be_said(published, tokenizer, policy, tmp_path):
    options = {"preset": "pi0_libero", "tokenizer": tokenizer, "executed_steps": 2}
    two = load_policy(published["pi0"], **options)
    assert two.layout.executed_steps == 2
    assert two.fingerprint == policy.fingerprint  # no action changes
    two.save(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").config.executed_steps == 2
    assert load_policy(tmp_path / "saved", executed_steps=1).config.executed_steps == 1


def test_options_of_openpi_are_refused_by_others():
    for options in ({"preset": "pi0_libero"}, {"tokenizer": "t.model"}, {"executed_steps": 4}):
        with pytest.raises(InputError, match="OpenVLA, OpenVLA-OFT and UniVLA policies do not"):
            load_policy("libero-mini", **options)
    policy = load_policy("libero-mini")
    with pytest.raises(InputError, match="seed: libero-mini samples nothing"):
        policy.infer(policy.fake_observation(), seed=3)


def test_exported_statistics_stay_below_their_folder(policy, tmp_path):
    family = policy.family
    for asset in ("../up", "/elsewhere"):
        with pytest.raises(InputError, match="written below assets/"):
            family.export(policy.config, policy.model, {asset: {}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
