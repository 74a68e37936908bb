"""What the files do not tell: which robot, whose statistics, and what to do with an adapter."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax.checkpoints import public_tensors
from qvla_jax.errors import CheckpointError, CheckpointWarning, InputError
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic.checkpoint.export import reexport
from qvla_jax.families.prismatic.checkpoint.huggingface import read_config
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference import import_policy, load_policy, random_policy
from qvla_jax.inference.policy import make_policy
from qvla_jax.report.modules import describe

from .test_huggingface import STATISTICS, architecture, write_directory
from .test_lora import write as write_adapter

Q = "language_model.model.layers.0.self_attn.q_proj"
ROBOTS = {
    "libero": ("libero_x", 7, 8, (8, "quantiles", 2)),
    "aloha": ("aloha1_fold_cloth", 14, 14, (25, "min_max", 3)),
    "bridge": ("bridge_orig", 7, 7, (5, "quantiles", 1)),
}


def _entry(actions: int, proprio: int) -> dict:
    block = {"min": -1.5, "max": 1.5, "q01": -1.0, "q99": 1.0, "mean": 0.0, "std": 0.5}
    return {
        "action": {k: [v] * actions for k, v in block.items()} | {"mask": [True] * actions},
        "proprio": {k: [v] * proprio for k, v in block.items()},
        "num_transitions": 9,
        "num_trajectories": 1,
    }


def _directory(path, actions: int, proprio: int, key: str):
    config = dataclasses.replace(architecture("l1"), action_dim=actions, proprio_dim=proprio)
    write_directory(path, config, make_model(config, rngs=nnx.Rngs(0)))
    entries = {key: _entry(actions, proprio)}
    (path / "dataset_statistics.json").write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def oft(tmp_path_factory):
    """An OpenVLA-OFT directory with 7 entries of an action and 8 of the state."""
    return _directory(tmp_path_factory.mktemp("oft") / "hf", 7, 8, "libero_x")


@pytest.fixture(scope="module")
def aloha(tmp_path_factory):
    return _directory(tmp_path_factory.mktemp("oft") / "hf", 14, 14, "aloha1_fold_cloth")


def _config(folder, **said):
    return read_config(folder, LoadOptions(**said), empty_token_id=4)[0]


def _told(config):
    return config.action_horizon, config.action_normalization, config.num_images


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_statistics_tell_the_robot(tmp_path, robot):
    key, actions, proprio, expected = ROBOTS[robot]
    folder = _directory(tmp_path / "hf", actions, proprio, key)
    config, _ = read_config(folder)
    assert _told(config) == expected
    # Whoever trains with other constants says so.
    options = LoadOptions(action_horizon=50, action_normalization="quantiles", num_images=1)
    assert _told(read_config(folder, options)[0]) == (50, "quantiles", 1)


@pytest.mark.parametrize(
    ("key", "actions", "proprio"),
    [
        ("my_robot", 7, 8),
        ("libero_x", 14, 8),
        ("aloha_x", 7, 14),
        ("bridge_libero", 7, 7),
        ("libero_x", 7, 7),
    ],
)
def test_other_robots_have_to_be_described(tmp_path, key, actions, proprio):
    folder = _directory(tmp_path / "hf", actions, proprio, key)
    message = (
        rf"'{key}', {actions} entries of an action and {proprio} of the state.*action_horizon, "
        "action_normalization, num_images.*LIBERO: chunks of 8.*ALOHA: chunks of 25.*BRIDGE: chunks"
    )
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)
    with pytest.raises(CheckpointError, match="give action_normalization, num_images"):
        read_config(folder, LoadOptions(action_horizon=3))
    options = LoadOptions(action_horizon=3, action_normalization="min_max", num_images=3)
    assert _told(read_config(folder, options)[0]) == (3, "min_max", 3)
    assert describe(str(folder)).parameters  # sizes need nothing of it


def test_a_bimanual_policy_acts_in_its_units(aloha, tmp_path):
    policy = load_policy(aloha)
    normalized = np.ones((25, 14), np.float32)
    np.testing.assert_allclose(policy.unnormalize_actions(normalized), 1.5)
    np.testing.assert_allclose(policy.normalize_actions(np.full((25, 14), -1.5)), -1)
    np.testing.assert_allclose(policy.processor.actions.units, 1.5)
    observation = policy.fake_observation()
    assert set(observation) == {
        "image", "left_wrist_image", "right_wrist_image", "state", "instruction"
    }  # fmt: skip
    chunk = policy.infer(observation)
    assert chunk.shape == (25, 14)
    for key in observation:
        with pytest.raises(InputError, match=f"no '{key}'"):
            policy.infer({k: v for k, v in observation.items() if k != key})
    # Every picture is read, and each in its place.
    for one, other in (("image", "left_wrist_image"), ("left_wrist_image", "right_wrist_image")):
        swapped = observation | {one: observation[other], other: observation[one]}
        assert np.abs(policy.infer(swapped) - chunk).max() > 0
    policy.export(tmp_path / "out")
    import_policy(aloha, tmp_path / "in", dtype=np.float32)
    policy.save(tmp_path / "saved")
    for name in ("out", "in", "saved"):
        again = load_policy(tmp_path / name)
        assert (again.config, again.fingerprint) == (policy.config, policy.fingerprint), name
    # What is recorded is not contradicted.
    for name in ("out", "saved"):
        for said in (
            {"action_horizon": 8},
            {"num_images": 2},
            {"action_normalization": "quantiles"},
        ):
            with pytest.raises(InputError, match=f"{next(iter(said))}=.* contradicts"):
                load_policy(tmp_path / name, **said)
        assert load_policy(tmp_path / name, action_horizon=25, num_images=3).config == policy.config
        assert not load_policy(tmp_path / name, center_crop=False).config.center_crop


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_images": 4}, "num_images: 4 images are not supported; at most 3"),
        ({"num_images": 0}, "num_images: expected a whole number"),
        ({"num_images": True}, "num_images: expected a whole number"),
        ({"action_horizon": 0}, "action_horizon: expected a whole number"),
        ({"action_horizon": 2.0}, "action_horizon: expected a whole number"),
        ({"action_normalization": "bounds"}, "expected 'quantiles' or 'min_max', got 'bounds'"),
        ({"center_crop": 1}, "center_crop: expected True or False"),
        ({"unnorm_key": 3}, "unnorm_key: expected a name"),
        ({"unnorm_key": "libero_y"}, "unknown statistics 'libero_y'; did you mean libero_x"),
        ({"merge_adapter": True}, "merge_adapter: there is no lora_adapter/"),
    ],
)
def test_what_is_said_is_checked(oft, said, message):
    with pytest.raises(InputError, match=message):
        load_policy(oft, **said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"action_horizon": 8}, r"action_horizon=8: this OpenVLA policy has chunks of 1; decoding"),
        ({"num_images": 2}, "num_images=2: policies without a regression head take 1"),
    ],
)
def test_policies_that_decode_tokens_have_one_action_and_one_image(tmp_path, said, message):
    config = architecture("tokens")
    write_directory(tmp_path / "hf", config, make_model(config, rngs=nnx.Rngs(0)))
    assert _config(tmp_path / "hf", action_horizon=1, num_images=1) == config
    with pytest.raises(CheckpointError, match=message):
        _config(tmp_path / "hf", **said)
    code = tmp_path / "hf" / "modeling_prismatic.py"
    code.write_text("class OpenVLAForActionPrediction: ...")
    assert _config(tmp_path / "hf") == config
    code.write_text("from prismatic.vla.constants import NUM_ACTIONS_CHUNK")
    with pytest.raises(
        CheckpointError, match="is that of OpenVLA-OFT, but there is no action_head"
    ):
        _config(tmp_path / "hf")
    assert _config(tmp_path / "hf", action_horizon=1) == config


def test_own_policies_take_what_can_be_honoured(tmp_path):
    policy = random_policy("tiny-test")
    statistics = {**policy.statistics, "other": policy.statistics["libero_spatial"]}
    dataclasses.replace(policy, statistics=statistics).save(tmp_path)
    assert load_policy(tmp_path, unnorm_key="other").config.unnorm_key == "other"
    for said, message in (
        ({"unnorm_key": "bridge"}, "unknown statistics 'bridge'"),
        ({"center_crop": True}, "center_crop=True: tiny-test takes its images as they are"),
        ({"merge_adapter": True}, "merge_adapter: only public directories"),
        ({"num_images": 3}, "num_images=3 contradicts the recorded 2"),
    ):
        with pytest.raises(InputError, match=message):
            load_policy(tmp_path, **said)
    config = load_policy(tmp_path, num_images=2, center_crop=False, action_horizon=8).config
    assert config == policy.config


def test_statistics_are_changed_without_another_network(tmp_path):
    entries = {"a": _entry(7, 8), "b": _entry(7, 8), "c": _entry(6, 8)}
    entries["b"]["action"]["q99"] = [3.0] * 7
    config = dataclasses.replace(random_policy("tiny-test").config, unnorm_key="a")
    model = make_model(config, rngs=nnx.Rngs(0))
    policy = make_policy(config, model, word_files(), entries, source="test")
    other = policy.with_unnorm_key("b")
    assert other.model is policy.model
    assert other.config.unnorm_key == "b"
    ones = np.ones((8, 7), np.float32)
    np.testing.assert_allclose(policy.unnormalize_actions(ones), 1.0)
    np.testing.assert_allclose(other.unnormalize_actions(ones), 3.0)
    assert policy.with_unnorm_key("a") is policy
    with pytest.raises(InputError, match=r"unnorm_key 'd': .* there are: a, b, c"):
        policy.with_unnorm_key("d")
    with pytest.raises(InputError, match=r"c\.action: 6 entries, the policy has 7"):
        policy.with_unnorm_key("c")


@pytest.fixture
def beside(oft, tmp_path):
    """Weights, and a lora_adapter/ beside them."""
    folder = shutil.copytree(oft, tmp_path / "hf")
    rng = np.random.default_rng(0)
    low = {
        f"base_model.model.{Q}.lora_{half}.weight": rng.normal(size=shape).astype(np.float32)
        for half, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    write_adapter(folder / "lora_adapter", low, lora_alpha=8, target_modules="all-linear")
    return folder, low


def test_weights_beside_an_adapter_hold_it_already(oft, beside, tmp_path):
    folder, _ = beside
    expected = public_tensors(load_policy(oft).model)
    with pytest.warns(
        CheckpointWarning, match=r"lora_adapter: left alone.*merge_adapter=True"
    ) as w:
        found = load_policy(folder)
    assert len(w) == 1
    with pytest.warns(CheckpointWarning, match="left alone"):
        import_policy(folder, tmp_path / "in", dtype=np.float32)
    with pytest.warns(CheckpointWarning, match="left alone"):
        reexport(folder, tmp_path / "out")
    for policy in (found, load_policy(tmp_path / "in"), load_policy(tmp_path / "out")):
        tensors = public_tensors(policy.model)
        for name, tensor in expected.items():
            assert tensor.tobytes() == tensors[name].tobytes(), name


def test_a_base_takes_its_adapter_if_the_user_says_so(oft, beside, tmp_path):
    folder, low = beside
    base = public_tensors(load_policy(oft).model)
    a, b = (low[f"base_model.model.{Q}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    expected = base[f"{Q}.weight"] + 8 / 4 * b @ a
    import_policy(folder, tmp_path / "in", merge_adapter=True, dtype=np.float32)
    for policy in (load_policy(folder, merge_adapter=True), load_policy(tmp_path / "in")):
        found = public_tensors(policy.model)
        np.testing.assert_allclose(found[f"{Q}.weight"], expected, rtol=1e-5, atol=1e-6)
        assert all((t == base[n]).all() for n, t in found.items() if n != f"{Q}.weight")


def test_towers_with_film_hold_their_own_adapters(tmp_path):
    config = architecture("l1", film=True)
    write_directory(tmp_path / "hf", config, make_model(config, rngs=nnx.Rngs(0)))
    tower = "vision_backbone.featurizer.blocks.0.block.attn.proj"
    low = {f"base_model.model.{tower}.lora_{half}.weight": np.ones((4, 4)) for half in "AB"}
    write_adapter(tmp_path / "hf" / "lora_adapter", low)
    plain = public_tensors(load_policy(tmp_path / "hf", merge_adapter=True).model)
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model-1.safetensors")
    assert all((plain[name] == tensor).all() for name, tensor in stored.items())


def test_the_only_entry_is_taken_and_several_are_asked_for(oft, tmp_path):
    folder = shutil.copytree(oft, tmp_path / "hf")
    several = {**STATISTICS, "bridge_orig": STATISTICS["libero_x"]}
    (folder / "dataset_statistics.json").write_text(json.dumps(several))
    with pytest.raises(CheckpointError, match="name one with unnorm_key: libero_x, bridge_orig"):
        load_policy(folder)
    assert load_policy(folder, unnorm_key="libero_x").config.unnorm_key == "libero_x"
