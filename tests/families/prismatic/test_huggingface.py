"""Public directories, written here from our own random models."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qvla_jax.checkpoints import public_tensors
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.huggingface import _towers
from qvla_jax.families.prismatic.config import (
    PRESETS,
    LatentActionConfig,
    LlamaConfig,
    OpenVLAConfig,
    VisionTowerConfig,
)
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files, word_tokenizer
from qvla_jax.inference import load_policy
from qvla_jax.inference.policy import make_policy

from ...checkpoints.torch_files import save

STATISTICS = {
    "libero_x": {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}
SIZES = {"patch_size": 8, "depth": 3, "num_heads": 2}
ARCHS = {
    "a": {**SIZES, "embed_dim": 16, "init_values": 1e-5, "reg_tokens": 4},
    "b": {
        **SIZES,
        "embed_dim": 12,
        "mlp_ratio": 3.7362,
        "class_token": False,
        "global_pool": "map",
    },
}


def architecture(decoding: str, *, film: bool = False) -> OpenVLAConfig:
    common = {"image_size": 16, "patch_size": 8, "depth": 3, "num_heads": 2, "feature_block": 1}
    oft, latents = decoding == "l1", decoding == "latents"
    return OpenVLAConfig(
        name="hf",
        vision=(
            VisionTowerConfig(
                timm_id="a",
                embed_dim=16,
                mlp_dim=64,
                class_token=True,
                num_registers=4,
                layer_scale=True,
                final_norm=True,
                **common,
            ),
            VisionTowerConfig(
                timm_id="b",
                embed_dim=12,
                mlp_dim=44,
                final_norm=True,
                attention_pool=True,
                **common,
            ),
        ),
        text=LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
        ),
        num_images=2 if oft else 1,
        decoding=decoding,
        action_horizon=8 if oft else 5 if latents else 1,
        proprio_dim=8 if oft else 0,
        use_film=film,
        image_chain="openvla",
        center_crop=oft or latents,
        max_prompt_tokens=96,
        pad_token_id=448,
        empty_token_id=4,
        action_vocab_size=448,
        unnorm_key="libero_x",
        latent_action=LatentActionConfig(embed_dim=24, num_heads=1, mlp_dim=20)
        if latents
        else None,
    )


def write_directory(folder, config: OpenVLAConfig, model) -> None:
    folder.mkdir()
    components: dict[str, dict[str, np.ndarray]] = {}
    weights = {}
    for name, tensor in public_tensors(model).items():
        component, _, rest = name.partition(".")
        if component in ("action_head", "proprio_projector"):
            components.setdefault(component, {})[f"module.{rest}"] = tensor
        elif component == "action_decoder":
            components.setdefault(component, {})[rest] = tensor
        elif component == "vision_backbone" and config.use_film:
            components.setdefault(component, {})[name] = tensor
        else:
            weights[name] = tensor
    for component, tensors in components.items():
        decoder = component == "action_decoder"
        save(folder / f"{component}{'-7' if decoder else '--7_checkpoint'}.pt", tensors)
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        safetensors.numpy.save_file({key: weights[key] for key in keys}, folder / shard)
    index = {key: shard for shard, keys in shards.items() for key in keys}
    files = {
        "model.safetensors.index.json": {"weight_map": index},
        "config.json": {
            "model_type": "openvla",
            "arch_specifier": "no-align+fused-gelu-mlp",
            "timm_model_ids": ["a", "b"],
            "image_sizes": [16, 16],
            "pad_token_id": 448,
            "pad_to_multiple_of": 64,
            "norm_stats": {"other": {}, "another": {}},
            "text_config": {
                "vocab_size": 512,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        },
        "preprocessor_config.json": {
            "tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}] * 2
        },
        "dataset_statistics.json": STATISTICS,
        "tiny_vision_archs.json": ARCHS,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    word_tokenizer().save(str(folder / "tokenizer.json"))


def observation() -> dict:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (16, 16, 3), np.uint8),
        "wrist_image": rng.integers(0, 256, (16, 16, 3), np.uint8),
        "state": rng.uniform(-1, 1, 8),
        "instruction": "open the drawer",
    }


@pytest.fixture
def oft(tmp_path):
    config = architecture("l1")
    write_directory(tmp_path / "hf", config, make_model(config, rngs=nnx.Rngs(0)))
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("decoding", "film"),
    [("l1", False), ("l1", True), ("tokens", False), ("latents", False)],
    ids=str,
)
def test_a_directory_acts_as_the_model_that_it_was_written_from(tmp_path, decoding, film):
    config = architecture(decoding, film=film)
    model = make_model(config, rngs=nnx.Rngs(3))
    write_directory(tmp_path / "hf", config, model)
    loaded = load_policy(tmp_path / "hf")
    assert loaded.config == config
    for name, tensor in public_tensors(model).items():
        np.testing.assert_array_equal(public_tensors(loaded.model)[name], tensor, err_msg=name)
    original = make_policy(config, model, word_files(), STATISTICS, source="test")
    chunk = loaded.infer(observation())
    assert chunk.shape == (config.action_horizon, 7)
    np.testing.assert_array_equal(chunk, original.infer(observation()))


def test_inline_lora_is_merged_with_the_training_scale(tmp_path):
    config = architecture("l1", film=True)
    model = make_model(config, rngs=nnx.Rngs(0))
    write_directory(tmp_path / "hf", config, model)
    tensors = {n: t for n, t in public_tensors(model).items() if n.startswith("vision_backbone.")}
    layer = "vision_backbone.featurizer.blocks.0.block.attn.qkv"
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((32, 16), (48, 32)))
    weight = tensors.pop(f"{layer}.weight")
    tensors[f"{layer}.base_layer.weight"] = weight
    tensors[f"{layer}.base_layer.bias"] = tensors.pop(f"{layer}.bias")
    tensors[f"{layer}.lora_A.default.weight"] = a
    tensors[f"{layer}.lora_B.default.weight"] = b
    save(tmp_path / "hf" / "vision_backbone--7_checkpoint.pt", tensors)
    merged = public_tensors(load_policy(tmp_path / "hf").model)[f"{layer}.weight"]
    expected = weight.astype(np.float64) + 0.5 * b.astype(np.float64) @ a
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


def _edit(folder, file: str, **changes) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"arch_specifier": "linear"},
            "'arch_specifier' is 'linear', which is not supported; expect",
        ),
        ("config.json", {"timm_model_ids": ["a", "c"]}, "vision tower 'c' is not built in"),
        ("config.json", {"pad_token_id": None, "text_config": {}}, "missing or unusable key"),
        (
            "preprocessor_config.json",
            {"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}] * 2},
            r"preprocessor_config.json: tvf_normalize_params\[0\]: 'std' .* 3 positive num",
        ),
        (
            "preprocessor_config.json",
            {"tvf_normalize_params": [{"mean": [0.5] * 4, "std": [0.5] * 3}] * 2},
            "'mean' is .* expected 3 numbers",
        ),
        (
            "preprocessor_config.json",
            {"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}]},
            "'tvf_normalize_params' has 1 entries, but config.json has 2 towers",
        ),
        (
            "dataset_statistics.json",
            {"libero_y": {}},
            "name one with unnorm_key: libero_x, libero_y",
        ),
        (
            "model.safetensors.index.json",
            {"weight_map": {"x": "../model-1.safetensors"}},
            "missing; the index names it",
        ),
        (
            "model.safetensors.index.json",
            {"weight_map": {"x": "model-1.safetensors"}},
            "model-1.safetensors: tensor 'x' is missing",
        ),
    ],
)
def test_what_does_not_fit_is_named(oft, file, changes, message):
    _edit(oft, file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_policy(oft)


def test_truncated_shards_are_named(oft):
    path = oft / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: not a readable"):
        load_policy(oft)


def test_statistics_that_are_not_there_are_missed(oft):
    (oft / "dataset_statistics.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no statistics of actions, neither in dataset_stati"):
        load_policy(oft)


@pytest.mark.parametrize("mean", [(0.484375, 0.455078125, 0.40625), (0.485, 0.456, 0.406)])
def test_colours_of_a_known_tower_are_those_of_the_files(tmp_path, mean):
    """OpenVLA-7B's are rounded to bfloat16; those of models that were converted later are not."""
    towers = PRESETS["openvla-7b"].vision
    params = [{"mean": mean, "std": (0.229, 0.224, 0.225)}, {"mean": [0.5] * 3, "std": [0.5] * 3}]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"tvf_normalize_params": params}))
    raw = {"timm_model_ids": [tower.timm_id for tower in towers], "image_sizes": [224, 224]}
    first, second = _towers(tmp_path, raw)
    assert first == dataclasses.replace(towers[0], mean=mean, std=(0.229, 0.224, 0.225))
    assert second == towers[1]
    with pytest.raises(CheckpointError, match=r"'image_sizes' has 384 for .* expected 224"):
        _towers(tmp_path, raw | {"image_sizes": [384, 224]})
