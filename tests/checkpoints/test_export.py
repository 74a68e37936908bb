"""Synthetic directories, re-export, and the bytes that come back."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qvla_jax.checkpoints.export import reexport, synthesize
from qvla_jax.checkpoints.huggingface import read_config
from qvla_jax.checkpoints.tensor_files import ShardedTensors, write_shards
from qvla_jax.config import OpenVLAConfig, preset
from qvla_jax.errors import CheckpointError, InputError


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


def test_reexport_is_bit_exact(folder, tmp_path):
    reexport(folder, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}
    before, after = ShardedTensors(folder), ShardedTensors(tmp_path / "out")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == np.dtype(ml_dtypes.bfloat16)
        assert tensor.tobytes() == after[name].tobytes(), name


def test_files_are_not_overwritten(config, folder):
    with pytest.raises(InputError, match="holds files already"):
        synthesize(config, folder)
    with pytest.raises(InputError, match="holds files already"):
        reexport(folder, folder)


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
