from math import inf, nan

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax.checkpoints import load_weights, public_tensors, save_weights
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.network import OpenVLAOFT


def make(seed: int = 0) -> OpenVLAOFT:
    return OpenVLAOFT(preset("tiny-test"), rngs=nnx.Rngs(seed))


def test_names_and_layouts_are_the_public_ones():
    tensors = public_tensors(make())
    config = preset("tiny-test")
    assert tensors["vision_backbone.featurizer.patch_embed.proj.weight"].shape == (16, 3, 16, 16)
    assert tensors["vision_backbone.featurizer.blocks.0.ls1.scale_factor"].shape == (16,)
    assert tensors["language_model.model.embed_tokens.weight"].shape == (96, 32)
    assert tensors["language_model.model.layers.0.mlp.down_proj.weight"].shape == (32, 48)
    assert tensors["action_head.model.fc1.weight"].shape == (32, 7 * config.text.hidden_size)
    assert "language_model.model.layers.0.self_attn.q_proj.bias" not in tensors


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
    model, other = make(0), make(1)
    save_weights(model, tmp_path / "w.safetensors", dtype=dtype)
    load_weights(other, tmp_path / "w.safetensors")
    loaded = public_tensors(other)
    for name, tensor in public_tensors(model).items():
        expected = tensor if dtype is None else tensor.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


def _broken(tmp_path, change):
    tensors = public_tensors(make())
    change(tensors)
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def vector(size: int, value: float = 0.0) -> np.ndarray:
    return np.full(size, value, np.float32)


NAME = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"{NAME}' of shape \(32,\) is missing"),
        (lambda t: t.update(extra=vector(1)), r"'extra' of shape \(1,\) is unexpected"),
        (lambda t: t.update({NAME: vector(3)}), rf"{NAME}' has shape \(3,\), expected"),
        (lambda t: t.update({NAME: vector(32, nan)}), f"{NAME}' holds NaN or inf"),
        (lambda t: t.update({NAME: vector(32, inf)}), f"{NAME}' holds NaN or inf"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(make(1), _broken(tmp_path, change))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_weights(make(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: not a readable"):
        load_weights(make(), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such weights file"):
        load_weights(make(), tmp_path / "nothing.safetensors")
