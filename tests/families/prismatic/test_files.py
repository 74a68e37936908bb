"""Directories that lack a part, or hold one that would be passed over."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.directory import PublicTensors
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.inference import import_policy, load_policy
from qvla_jax.report.modules import describe

from ...checkpoints.torch_files import save
from .test_huggingface import architecture, write_directory

INDEX = "model.safetensors.index.json"
HEAD, PROJECTOR = "action_head--7_checkpoint.pt", "proprio_projector--7_checkpoint.pt"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    config = architecture("l1")
    folder = tmp_path_factory.mktemp("public") / "hf"
    write_directory(folder, config, make_model(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "hf")


def _without_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _as_pytorch(folder):
    _without_weights(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def _adapter_only(folder, settings: str = "{}"):
    _without_weights(folder)
    (folder / "config.json").unlink()
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text(settings)


def _adapter_at_the_top(folder):
    _adapter_only(folder)
    (folder / "lora_adapter" / "adapter_config.json").rename(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "lora_adapter").rmdir()


def _copied_head(folder):
    shutil.copy(folder / HEAD, folder / "action_head--8_checkpoint.pt")


def _diffusion_head(folder):
    (folder / HEAD).unlink()
    save(folder / HEAD, {"noise_predictor.mlp_resnet.fc1.weight": np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: (d / INDEX).unlink(),
            f"{INDEX}: missing; the shards are there (model-1.safetensors and 1 more)",
        ),
        (_as_pytorch, "the weights are pytorch_model-00001-of-00002.bin, which are not read; conv"),
        (_adapter_only, "a run with an adapter only"),
        (
            lambda d: _adapter_only(d, '{"base_model_name_or_path": "openvla/openvla-7b"}'),
            "merge it into its base, 'openvla/openvla-7b'",
        ),
        (_adapter_at_the_top, "a run with an adapter only"),
        (_without_weights, f"model.safetensors: missing, and so is {INDEX}: there are no weights"),
        (
            lambda d: (d / HEAD).rename(d / "action_head.pt"),
            f"there is a proprio projector of an OpenVLA-OFT policy ({PROJECTOR}), but no "
            "action_head--*_checkpoint.pt; is it action_head.pt?",
        ),
        (lambda d: (d / HEAD).unlink(), "but no action_head--*_checkpoint.pt"),
        (
            lambda d: (d / PROJECTOR).rename(d / "proprio_projector.pt"),
            "proprio_projector.pt: would be passed over; call it proprio_projector--0_checkpoint",
        ),
        (_copied_head, f"several action_head files: ['{HEAD}', 'action_head--8_checkpoint.pt']"),
        (_diffusion_head, f"{HEAD}: is a diffusion head, which is not supported"),
        (
            lambda d: (d / "noisy_action_projector--7_checkpoint.pt").write_bytes(b""),
            "noisy_action_projector--7_checkpoint.pt: belongs to a diffusion head",
        ),
        (
            lambda d: (d / "memory_bank--7_checkpoint.pt").write_bytes(b""),
            "memory_bank--7_checkpoint.pt: would be passed over; take it away",
        ),
        (
            lambda d: (d / "non_lora_trainables.bin").write_bytes(b""),
            "non_lora_trainables.bin: would be passed over",
        ),
        (
            lambda d: (d / "adapter_config.json").write_text("{}"),
            "adapter_config.json: an adapter beside weights, where transformers would load",
        ),
        (
            lambda d: shutil.copy(d / "model-1.safetensors", d / "model-3.safetensors"),
            f"model-3.safetensors: would be passed over: {INDEX} lacks it",
        ),
        (
            lambda d: safetensors.numpy.save_file({}, d / "model.safetensors"),
            f"model.safetensors: would be passed over: {INDEX} lacks it",
        ),
    ],
)
def test_what_is_missing_or_passed_over_is_named(folder, change, message):
    change(folder)
    for read in (
        load_policy,
        lambda f: import_policy(f, folder / "new"),
        lambda f: describe(str(f)),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read(folder)


def test_what_training_leaves_is_passed_over(original, folder):
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    (folder / HEAD).rename(folder / "action_head--latest_checkpoint.pt")
    assert load_policy(folder).fingerprint == load_policy(original).fingerprint


def _edited(folder, change):
    path = folder / "model-1.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    kept = {name: file for name, file in listed.items() if file != path.name}
    (folder / INDEX).write_text(
        json.dumps({"weight_map": kept | dict.fromkeys(tensors, path.name)})
    )
    return tensors


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "language_model.model.layers.1.self_attn.rotary_emb.cos_cached",
        "vision_backbone.featurizer.embeddings.position_ids",
    ],
)
def test_buffers_that_the_public_code_ignores_are_ignored(original, folder, name):
    _edited(folder, lambda tensors: tensors.update({name: np.arange(4, dtype=np.float32)}))
    found = public_tensors(load_policy(folder).model)
    assert name not in PublicTensors(folder)
    for key, tensor in public_tensors(load_policy(original).model).items():
        assert tensor.tobytes() == found[key].tobytes(), key


def test_quantized_weights_are_refused(folder):
    name = "projector.fc2.weight"

    def quantize(tensors):
        tensors[name] = tensors[name].astype(np.int8)

    path = folder / "model-1.safetensors"
    if name not in safetensors.numpy.load_file(path):
        (folder / "model-2.safetensors").rename(folder / "x")
        path.rename(folder / "model-2.safetensors")
        (folder / "x").rename(path)
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        swap = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": path.name}
        listed = {key: swap[file] for key, file in listed.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    _edited(folder, quantize)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds int8, expected floating"):
        load_policy(folder)


def test_components_in_bfloat16_load(original, folder):
    tensors = read_torch_zip(folder / HEAD)
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save(folder / HEAD, narrow)
    head = public_tensors(load_policy(folder).model.action_head)
    for name, tensor in narrow.items():
        np.testing.assert_array_equal(head[name.removeprefix("module.")], tensor.astype(np.float32))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "dataset_statistics.json",
        INDEX,
        HEAD,
        "model-1.safetensors",
    ],
)
def test_a_pointer_of_git_lfs_is_told(folder, name):
    assert (folder / name).is_file()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: a pointer of Git LFS"):
        load_policy(folder)
