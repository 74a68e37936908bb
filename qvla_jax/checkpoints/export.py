"""Writing the public Hugging Face layout: re-export of a directory, and synthetic directories.

Tensors pass one at a time through the same path as in `load_policy`: mapped, checked, brought into
Flax's layout and placed on the device; then back.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.huggingface import CONFIG_FILE, STATISTICS_FILE, read_config, read_tensors
from qvla_jax.checkpoints.tensor_files import INDEX_FILE, ShardedTensors, write_shards
from qvla_jax.checkpoints.weights import public_layout, public_shapes, through_flax
from qvla_jax.config import OpenVLAConfig, VisionTowerConfig
from qvla_jax.errors import InputError
from qvla_jax.models.openvla import abstract_model

# Random values are drawn once and reused: a full-size directory is written at the disk's speed.
_BLOCK: Final = 1 << 22


def reexport(source: Path, out: Path, *, unnorm_key: str | None = None) -> None:
    """Imports a public directory tensor by tensor and writes it again, bit for bit.

    Component files (`.pt`), adapters, tokenizer and settings are copied as they are; tensors that a
    component file overrides are left out. A `lora_adapter` folder is refused: its weights would be
    merged and then merged again.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor does not fit its model.
        InputError: `out` holds files already.
    """
    if (source / "lora_adapter").is_dir():
        raise InputError(f"{source}: holds an unmerged adapter, which would be merged twice")
    _check_empty(out)
    config, _ = read_config(source, unnorm_key=unnorm_key)
    stored = ShardedTensors(source)
    imported = _Imported(abstract_model(config), read_tensors(source), stored, str(source))
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, imported)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_FILE:
            shutil.copyfile(path, out / path.name)


class _Imported(Mapping[str, np.ndarray]):
    """Public tensors that were imported, each when it is asked for."""

    def __init__(
        self,
        model: nnx.Module,
        tensors: Mapping[str, np.ndarray],
        stored: Mapping[str, np.ndarray],
        source: str,
    ):
        components = {name for name in tensors if name not in stored}
        film = any(".block." in name for name in components)
        self._names = [
            n for n in stored if not (film and n.startswith("vision_backbone.")) and n in tensors
        ]
        self._convert = through_flax(model, tensors, source=source)

    def __getitem__(self, name: str) -> np.ndarray:
        leaf, value = self._convert(name)
        return public_layout(name, leaf, np.asarray(jax.device_put(value)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def synthesize(config: OpenVLAConfig, out: Path, *, seed: int = 0) -> None:
    """Writes a public directory with random bfloat16 weights and statistics of unit range.

    For measurements at full size: about 15 GB for `openvla-7b`. Only architectures without
    component files (`.pt`) are written.

    Raises:
        InputError: the architecture has an action head, or `out` holds files already.
    """
    if config.decoding != "tokens":
        raise InputError(f"{config.name}: only token policies are synthesized, such as openvla-7b")
    _check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, _Random(public_shapes(abstract_model(config)), seed))
    unit = {"q01": [-1.0] * config.action_dim, "q99": [1.0] * config.action_dim}
    for name, content in public_settings(config).items():
        write_json(out / name, content)
    write_json(out / STATISTICS_FILE, {"synthetic": {"action": unit}})


class _Random(Mapping[str, np.ndarray]):
    """Tensors of given shapes with normal entries of deviation 0.02, bfloat16."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self._shapes = shapes
        block = np.random.default_rng(seed).normal(0.0, 0.02, _BLOCK)
        self._block = block.astype(ml_dtypes.bfloat16)

    def __getitem__(self, name: str) -> np.ndarray:
        # Another start for each tensor, so that they differ.
        start = sum(name.encode()) * 7919 % _BLOCK
        return np.resize(np.roll(self._block, start), self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def public_settings(config: OpenVLAConfig) -> dict[str, Any]:
    """config.json, preprocessor_config.json and the tower sizes that are not built in."""
    text = dataclasses.asdict(config.text)
    return {
        CONFIG_FILE: {
            "model_type": "openvla",
            "arch_specifier": "no-align+fused-gelu-mlp",
            "timm_model_ids": [tower.timm_id for tower in config.vision],
            "image_sizes": [tower.image_size for tower in config.vision],
            "pad_token_id": config.pad_token_id,
            "pad_to_multiple_of": config.text.vocab_size - config.action_vocab_size,
            "text_config": text,
        },
        "preprocessor_config.json": {
            "tvf_normalize_params": [
                {"mean": list(tower.mean), "std": list(tower.std)} for tower in config.vision
            ]
        },
        "tiny_vision_archs.json": {tower.timm_id: _sizes(tower) for tower in config.vision},
    }


def _sizes(tower: VisionTowerConfig) -> dict[str, Any]:
    return {
        "patch_size": tower.patch_size,
        "embed_dim": tower.embed_dim,
        "depth": tower.depth,
        "num_heads": tower.num_heads,
        # The width is the integer part of the product: half a unit above never falls below it.
        "mlp_ratio": (tower.mlp_dim + 0.5) / tower.embed_dim,
        "class_token": tower.class_token,
        "reg_tokens": tower.num_registers,
        "init_values": 1e-5 if tower.layer_scale else None,
        "global_pool": "map" if tower.attention_pool else "",
    }


def _check_empty(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds files already; name an empty or a new folder")
