"""Exported policies, re-exported and synthetic directories, and the bytes that come back."""

import dataclasses
import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.tensor_files import ShardedTensors, write_shards
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.data import calibration_set
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.prismatic.checkpoint.export import reexport, synthesize
from qvla_jax.families.prismatic.checkpoint.huggingface import read_config
from qvla_jax.families.prismatic.config import OpenVLAConfig, preset
from qvla_jax.families.prismatic.word_tokenizer import word_tokenizer
from qvla_jax.inference import load_policy, random_policy


@pytest.fixture(scope="module")
def config() -> OpenVLAConfig:
    full, small = preset("openvla-7b"), preset("tiny-test")
    first, second = (
        dataclasses.replace(
            t, embed_dim=8 * (i + 1), depth=2, num_heads=2, mlp_dim=29, feature_block=0
        )
        for i, t in enumerate(full.vision)
    )
    text = dataclasses.replace(small.text, vocab_size=384)
    return dataclasses.replace(full, vision=(first, second), text=text, action_vocab_size=320)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "s"
    synthesize(config, path)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_synthetic_directory_describes_its_architecture(config, folder):
    read, statistics = read_config(folder)
    assert read.vision == config.vision
    assert read.text == config.text
    assert read.action_vocab_size == config.action_vocab_size
    assert set(statistics) == {"synthetic"}


def test_synthetic_weights_are_heavy_tailed_and_their_channels_differ(folder):
    tensors = ShardedTensors(folder)
    weight = tensors["projector.fc1.weight"].astype(np.float64)
    rows = weight.std(axis=1)
    # A normal distribution has kurtosis 3, and rows of one deviation spread by less than 1.5.
    kurtosis = np.mean((weight / rows[:, None]) ** 4)
    assert kurtosis > 4
    assert np.percentile(rows, 95) / np.percentile(rows, 5) > 2.5
    norm = tensors["language_model.model.norm.weight"].astype(np.float64)
    assert abs(norm.mean() - 1) < 0.1


def test_a_synthetic_directory_with_an_action_head_loads(config, tmp_path):
    oft = dataclasses.replace(
        config, decoding="l1", action_horizon=8, proprio_dim=8, num_images=2, center_crop=True
    )
    synthesize(oft, tmp_path / "s")
    word_tokenizer().save(str(tmp_path / "s" / "tokenizer.json"))
    assert {p.name for p in (tmp_path / "s").glob("*.pt")} == {
        "action_head--0_checkpoint.pt",
        "proprio_projector--0_checkpoint.pt",
    }
    loaded = load_policy(tmp_path / "s", dtype=ml_dtypes.bfloat16)
    assert loaded.config.decoding == "l1"
    assert (loaded.config.num_images, loaded.config.proprio_dim) == (2, 8)
    head = public_tensors(loaded.model.action_head)
    stored = read_torch_zip(tmp_path / "s" / "action_head--0_checkpoint.pt")
    assert head.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(head[name], tensor, err_msg=name)


def test_towers_with_film_are_not_synthesized(tmp_path):
    film = dataclasses.replace(preset("tiny-test"), use_film=True)
    with pytest.raises(InputError, match="towers with FiLM are not synthesized"):
        synthesize(film, tmp_path / "s")


def test_reexport_is_bit_exact(folder, tmp_path):
    reexport(folder, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}
    before, after = ShardedTensors(folder), ShardedTensors(tmp_path / "out")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == np.dtype(ml_dtypes.bfloat16)
        assert tensor.tobytes() == after[name].tobytes(), name


FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"


@pytest.fixture(
    scope="module", params=["openvla_tiny", "openvla_oft_tiny", "openvla_oft_film_tiny"]
)
def public(request, tmp_path_factory):
    """A directory that the public code wrote, but for weights that nothing reads."""
    path = tmp_path_factory.mktemp("public") / request.param
    zipfile.ZipFile(FIXTURES / f"{request.param}.zip").extractall(path)
    return path


KEY = "libero_spatial_no_noops"


def test_an_imported_policy_is_exported_and_imported_bit_for_bit(public, tmp_path):
    policy = load_policy(public, unnorm_key=KEY)
    policy.export(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert again.config == policy.config
    assert again.statistics == policy.statistics
    tensors = public_tensors(again.model)
    for name, tensor in public_tensors(policy.model).items():
        assert tensor.tobytes() == tensors[name].tobytes(), name
    assert again.fingerprint == policy.fingerprint
    # Settings of the caller go before those that the export kept.
    assert load_policy(tmp_path / "out", center_crop=False).config.center_crop is False


def test_exported_files_have_the_names_and_shapes_of_the_public_ones(public, tmp_path):
    load_policy(public, unnorm_key=KEY).export(tmp_path / "out")
    theirs = {p.name.split("--")[0]: read_torch_zip(p) for p in public.glob("*.pt")}
    ours = {p.name.split("--")[0]: read_torch_zip(p) for p in (tmp_path / "out").glob("*.pt")}
    assert ours.keys() == theirs.keys()
    for part, tensors in theirs.items():
        shapes = {n.removeprefix("module."): t.shape for n, t in tensors.items()}
        assert {n: t.shape for n, t in ours[part].items()} == shapes, part
    stored, written = ShardedTensors(public), ShardedTensors(tmp_path / "out")
    assert set(stored) <= set(written)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    # Towers that a component replaces were left out of the trimmed fixture.
    extra = set(written) - set(stored)
    assert all(n.startswith("vision_backbone.") and ".block." not in n for n in extra)
    for file in ("config.json", "preprocessor_config.json"):
        expected, found = (json.loads((d / file).read_text()) for d in (public, tmp_path / "out"))
        # Written by transformers itself, not by the public code.
        missing = set(expected) - set(found) - {"torch_dtype", "transformers_version"}
        assert not missing, file


def test_a_directory_in_bfloat16_comes_back_through_float32(tmp_path):
    zipfile.ZipFile(FIXTURES / "openvla_realvocab_bf16.zip").extractall(tmp_path / "in")
    stored = ShardedTensors(tmp_path / "in")
    policy = load_policy(tmp_path / "in", unnorm_key="bridge_orig")
    policy.export(tmp_path / "out", dtype=ml_dtypes.bfloat16)
    written = ShardedTensors(tmp_path / "out")
    assert set(written) == set(stored)
    assert all(t.tobytes() == written[n].tobytes() for n, t in stored.items())


def test_a_bundled_policy_is_exported_and_acts_the_same(tmp_path):
    policy = load_policy("libero-mini")
    policy.export(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert again.fingerprint == policy.fingerprint
    batch = next(iter(calibration_set("bundled", frames=2).batches(2)))
    np.testing.assert_array_equal(again.infer_normalized(batch), policy.infer_normalized(batch))


def test_what_the_layout_has_no_place_for_is_refused(tmp_path):
    policy = random_policy("tiny-test")
    layer = policy.model.language_model.model.layers[0].self_attn.q_proj
    layer.bias = nnx.Param(np.zeros(32, np.float32))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' of shape \(32,\) is unexpected"):
        policy.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kept_settings_are_checked(tmp_path):
    random_policy("tiny-test").export(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["qvla_jax"]["prompt"] = "x"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json: qvla_jax: .*unknown key 'prompt'"):
        load_policy(tmp_path)


def test_files_are_not_overwritten(config, folder):
    with pytest.raises(InputError, match="holds files already"):
        synthesize(config, folder)
    with pytest.raises(InputError, match="holds files already"):
        reexport(folder, folder)
    with pytest.raises(InputError, match="holds files already"):
        random_policy("tiny-test").export(folder)


def test_shards_are_read_by_the_library_and_split_by_size(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.integers(0, 9, (5,)),
        "c": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
    }
    write_shards(tmp_path, tensors, shard_bytes=50)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    read = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    ours = ShardedTensors(tmp_path)
    for name, tensor in tensors.items():
        assert ours[name].dtype == read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)
        np.testing.assert_array_equal(ours[name], tensor)


def test_a_wrong_shape_is_named(folder, tmp_path):
    tensors = dict(ShardedTensors(folder).items())
    tensors["projector.fc1.bias"] = np.zeros(3, ml_dtypes.bfloat16)
    for path in folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    write_shards(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'projector\.fc1\.bias' has shape \(3,\), expected"):
        reexport(tmp_path, tmp_path / "out")
