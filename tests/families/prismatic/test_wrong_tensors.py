"""A missing, an unexpected and a mis-shaped tensor of every component: named, with its file."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax import kernels
from qvla_jax.checkpoints.packed_file import write_packed
from qvla_jax.checkpoints.tensor_files import ShardedTensors, write_shards
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.inference import import_policy, load_policy
from qvla_jax.report.modules import describe

from ...checkpoints.torch_files import save
from .test_huggingface import architecture, write_directory

# Component -> (a tensor as its file names it, prefix under which errors name it).
WEIGHTS = {
    "DINOv2": "vision_backbone.featurizer.blocks.1.ls2.scale_factor",
    "SigLIP": "vision_backbone.fused_featurizer.patch_embed.proj.weight",
    "projector": "projector.fc2.bias",
    "Llama": "language_model.model.layers.1.self_attn.k_proj.weight",
    "Llama's head": "language_model.lm_head.weight",
}
PARTS = {
    "action head": ("action_head", "model.mlp_resnet_blocks.1.ffn.1.weight", "action_head."),
    "action head, first layer": ("action_head", "model.layer_norm1.bias", "action_head."),
    "proprio projector": ("proprio_projector", "fc2.weight", "proprio_projector."),
    "FiLM backbone": ("vision_backbone", "vision_backbone.featurizer.blocks.2.scale.weight", ""),
    "FiLM backbone, its block": (
        "vision_backbone",
        "vision_backbone.fused_featurizer.blocks.0.block.mlp.fc1.bias",
        "",
    ),
}
SHIFT = "vision_backbone.fused_featurizer.blocks.1.block.attn.proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A public directory with every component, and what is in it."""
    config = architecture("l1", film=True)
    folder = tmp_path_factory.mktemp("public") / "hf"
    write_directory(folder, config, make_model(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One whose towers stand among the weights."""
    config = architecture("l1")
    folder = tmp_path_factory.mktemp("public") / "hf"
    write_directory(folder, config, make_model(config, rngs=nnx.Rngs(0)))
    return folder


def _changed(tensors: dict[str, np.ndarray], name: str, kind: str) -> tuple[str, str]:
    """Breaks one tensor; returns its name and what an error must say of it."""
    shape = tensors[name].shape
    if kind == "missing":
        del tensors[name]
        return name, f"of shape {shape} is missing"
    if kind == "unexpected":
        extra = name.rpartition(".")[0] + ".extra"
        tensors[extra] = np.zeros(3, np.float32)
        return extra, "of shape (3,) is unexpected"
    wrong = (shape[0] + 1, *shape[1:])
    tensors[name] = np.zeros(wrong, np.float32)
    return name, f"has shape {wrong}, expected {shape}"


def _refused(folder, file, name: str, text: str) -> None:
    message = re.escape(f"{file}: tensor {name!r} {text}")
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)
    with pytest.raises(CheckpointError, match=message):
        describe(str(folder))


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mis-shaped"])
@pytest.mark.parametrize("component", WEIGHTS)
def test_a_wrong_weight_is_named_with_its_shard(plain, tmp_path, component, kind):
    folder = _copy(plain, tmp_path)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    name = WEIGHTS[component]
    shard = folder / listed[name]
    tensors = safetensors.numpy.load_file(shard)
    name, text = _changed(tensors, name, kind)
    shard.unlink()
    safetensors.numpy.save_file(tensors, shard)
    kept = {n: f for n, f in listed.items() if f != shard.name}
    index.unlink()
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, shard.name)}))
    _refused(folder, index if kind == "missing" else shard, name, text)


def _copy(directory, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in directory.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _rewritten(folder, part: str, change):
    path = folder / f"{part}--7_checkpoint.pt"
    tensors = {n.removeprefix("module."): t for n, t in read_torch_zip(path).items()}
    told = change(tensors)
    path.unlink()
    save(path, tensors)
    return path, told


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mis-shaped"])
@pytest.mark.parametrize("component", PARTS)
def test_a_wrong_tensor_is_named_with_its_pt_file(directory, tmp_path, component, kind):
    folder = _copy(directory, tmp_path)
    part, name, prefix = PARTS[component]
    path, (name, text) = _rewritten(folder, part, lambda tensors: _changed(tensors, name, kind))
    _refused(folder, path, f"{prefix}{name}", text)


@pytest.mark.parametrize("kind", ["missing", "mis-shaped"])
def test_a_refused_import_leaves_nothing_behind(directory, tmp_path, kind):
    folder = _copy(directory, tmp_path)
    part, name, prefix = PARTS["action head"]
    path, (name, text) = _rewritten(folder, part, lambda tensors: _changed(tensors, name, kind))
    message = re.escape(f"{path}: tensor {f'{prefix}{name}'!r} {text}")
    with pytest.raises(CheckpointError, match=message):
        import_policy(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "action_head",
            lambda t: t.pop("model.fc2.bias"),
            "tensor 'model.fc2.bias' with 1 dimensions is missing",
        ),
        (
            "action_head",
            lambda t: t.update({"model.fc2.bias": np.zeros(6, np.float32)}),
            "tensor 'model.fc2.weight' has shape (7, 16), expected (6, 16), or 'model.fc2.bias'",
        ),
        (
            "action_head",
            lambda t: t.update({"model.fc2.weight": np.zeros(7, np.float32)}),
            "tensor 'model.fc2.weight' has shape (7,), expected 2 dimensions",
        ),
        (
            "proprio_projector",
            lambda t: t.pop("fc1.weight"),
            "tensor 'fc1.weight' with 2 dimensions is missing",
        ),
        (
            "proprio_projector",
            lambda t: t.update({"fc1.weight": np.zeros((16, 9), np.float32)}),
            "tensor 'fc1.weight' is for 9 entries of proprio, expected 8",
        ),
    ],
)
def test_tensors_that_tell_a_size_are_named_too(directory, tmp_path, part, change, message):
    folder = _copy(directory, tmp_path)
    path, _ = _rewritten(folder, part, change)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")):
        load_policy(folder)


def _adapted(tensors: dict[str, np.ndarray]) -> None:
    """Puts an adapter of rank 4 on a layer of 12 channels."""
    weight = tensors.pop(f"{SHIFT}.weight")
    tensors[f"{SHIFT}.base_layer.weight"] = weight
    tensors[f"{SHIFT}.base_layer.bias"] = tensors.pop(f"{SHIFT}.bias")
    tensors[f"{SHIFT}.lora_A.default.weight"] = np.ones((4, 12), np.float32)
    tensors[f"{SHIFT}.lora_B.default.weight"] = np.ones((12, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (
            lambda t: t.pop(f"{SHIFT}.lora_A.default.weight"),
            f"{SHIFT}.lora_A.default.weight",
            "of shape (4, 12) is missing",
        ),
        (
            lambda t: t.pop(f"{SHIFT}.lora_B.default.weight"),
            f"{SHIFT}.lora_B.default.weight",
            "of shape (12, 4) is missing",
        ),
        (
            lambda t: t.pop(f"{SHIFT}.base_layer.weight"),
            f"{SHIFT}.base_layer.weight",
            "is missing, which",
        ),
        (
            lambda t: t.update({f"{SHIFT}.lora_A.default.weight": np.ones((4, 13), np.float32)}),
            f"{SHIFT}.lora_A.default.weight",
            "has shape (4, 13), expected (4, 12)",
        ),
        (
            lambda t: t.update({f"{SHIFT}.lora_B.default.weight": np.ones((12, 5), np.float32)}),
            f"{SHIFT}.lora_B.default.weight",
            "has shape (12, 5), expected (12, 4)",
        ),
        (
            lambda t: t.update({f"{SHIFT}.lora_A.other.weight": np.ones((4, 12), np.float32)}),
            f"{SHIFT}.lora_A.other.weight",
            "of shape (4, 12) is unexpected",
        ),
        (
            lambda t: t.update({f"{SHIFT}.base_layer.extra": np.ones(12, np.float32)}),
            f"{SHIFT}.extra",
            "of shape (12,) is unexpected",
        ),
    ],
)
def test_a_wrong_adapter_inside_a_component_is_named(directory, tmp_path, change, name, text):
    folder = _copy(directory, tmp_path)

    def both(tensors):
        _adapted(tensors)
        change(tensors)

    path, _ = _rewritten(folder, "vision_backbone", both)
    _refused(folder, path, name, text)


@pytest.mark.parametrize(
    "fault", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:99])]
)
def test_an_input_that_vanishes_is_named_and_the_old_file_stays(tmp_path, fault):
    write_shards(tmp_path / "in", {f"{i}": np.ones((4, 16), np.float32) for i in range(2)})
    source = ShardedTensors(tmp_path / "in")
    (shard,) = (tmp_path / "in").glob("*-00001-*.safetensors")

    def layers():
        for name in source:
            yield name, kernels.pack(source[name], np.full(4, 4)), kernels.LayerInputs()
            fault(shard)

    out = tmp_path / "out" / "policy.qvla"
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=rf"{shard.name}: gone or changed"):
        write_packed(out, layers=layers(), tensors={}, files={"tokenizer.json": b"{}"}, header={})
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]
