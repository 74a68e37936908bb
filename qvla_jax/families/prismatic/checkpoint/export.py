"""Writes the public Hugging Face layout: for a model, an imported directory, or synthetic weights.

Tensors of a directory pass one at a time through the same path as in `load_policy`: mapped,
checked, brought into Flax's layout and placed on the device; then back.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.files import CONFIG_FILE, STATISTICS_FILE, check_empty, read_json
from qvla_jax.checkpoints.tensor_files import INDEX_FILE, ShardedTensors, write_shards
from qvla_jax.checkpoints.torch_writer import write_torch_zip
from qvla_jax.checkpoints.weights import (
    check_shapes,
    public_layout,
    public_shapes,
    public_tensors,
    through_flax,
)
from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.checkpoint.directory import PublicTensors
from qvla_jax.families.prismatic.checkpoint.huggingface import OWN_KEY, read_config
from qvla_jax.families.prismatic.checkpoint.settings import public_settings
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network.assembly import abstract_model
from qvla_jax.plain import finite

# Random values are drawn once and reused: a full-size directory is written at the disk's speed.
_BLOCK: Final = 1 << 22


# Linear maps of FiLM itself, which the public code adds after the adapters.
_FILM: Final = (".scale.weight", ".scale.bias", ".shift.weight", ".shift.bias")
# Parts that are component files, and the names of the files.
_WHOLE: Final = ("action_head", "proprio_projector", "action_decoder")
_FILES: Final = {
    "action_head": "action_head--0_checkpoint.pt",
    "proprio_projector": "proprio_projector--0_checkpoint.pt",
    "vision_backbone": "vision_backbone--0_checkpoint.pt",
    "action_decoder": "action_decoder.pt",
}
# Rank of the empty adapters in a vision backbone with FiLM: what the public evaluation expects.
_RANK: Final = 32


def export_model(
    config: OpenVLAConfig,
    model: nnx.Module,
    statistics: Mapping[str, Any],
    out: Path,
    *,
    dtype: Any = None,
) -> None:
    """Writes a model as a public directory, without the tokenizer.

    Action head, proprio projector, action decoder and a vision backbone with FiLM become component
    files. The public code wraps the latter in adapters before it loads it, so it is written with
    adapters that add nothing; as in public checkpoints, the towers without FiLM are also among the
    weights.

    Args:
        config: the model's configuration. What the layout cannot express is kept in config.json
            under the key `qvla_jax`, which the public code does not read.
        model: with arrays.
        statistics: data set name -> public statistics.
        out: an empty or new folder.
        dtype: dtype of all tensors; None keeps the parameters' own.

    Raises:
        InputError: `out` holds files already.
        CheckpointError: the model's parameters are not those of the configuration; a quantized
            model has biases that the layout cannot hold.
    """
    tensors = public_tensors(model, dtype=dtype)
    check_shapes(abstract_model(config), tensors, source=config.name)
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    weights: dict[str, np.ndarray] = {}
    components: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in _WHOLE:
            components.setdefault(part, {})[rest] = tensor
        elif part == "vision_backbone" and config.use_film:
            components.setdefault(part, {}).update(_adapted(name, tensor, tensors))
            if not name.endswith(_FILM):
                weights[name.replace(".block.", ".")] = tensor
        else:
            weights[name] = tensor
    write_shards(out, weights)
    for part, members in components.items():
        write_torch_zip(out / _FILES[part], members)
    _write_settings(config, statistics, out)


def _write_settings(config: OpenVLAConfig, statistics: Mapping[str, Any], out: Path) -> None:
    """Writes everything but the tokenizer and the weights, which already exist."""
    for name, content in public_settings(config).items():
        write_json(out / name, content)
    write_json(out / STATISTICS_FILE, statistics)
    settings = read_json(out / CONFIG_FILE)
    read, _ = read_config(out, sizes_only=True)
    told = read.to_dict() | {"name": None, "unnorm_key": None}  # folder and statistics may change
    own = {key: value for key, value in config.to_dict().items() if value != told.get(key)}
    if config.decoding == "l1":  # made up, because the files do not say
        for name in ("num_images", "action_horizon", "action_normalization", "center_crop"):
            own[name] = getattr(config, name)
    write_json(out / CONFIG_FILE, {**settings, "norm_stats": statistics, OWN_KEY: own})


def _adapted(
    name: str, tensor: np.ndarray, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A tensor of the towers under the name of an adapted layer, with an adapter of zeros."""
    layer, _, leaf = name.rpartition(".")
    weight = tensors.get(f"{layer}.weight")
    if weight is None or weight.ndim < 2 or name.endswith(_FILM):
        return {name: tensor}
    adapted = {f"{layer}.base_layer.{leaf}": tensor}
    if leaf == "weight":
        channels, *inputs = weight.shape
        ones = [1] * (len(inputs) - 1)
        adapted[f"{layer}.lora_A.default.weight"] = np.zeros((_RANK, *inputs), weight.dtype)
        adapted[f"{layer}.lora_B.default.weight"] = np.zeros((channels, _RANK, *ones), weight.dtype)
    return adapted


def reexport(source: Path, out: Path) -> None:
    """Imports a public directory tensor by tensor and writes it again, bit for bit.

    Component files (`.pt`), tokenizer and settings are copied as they are, and so are weights that
    a component file replaces. An adapter next to weights that include it is ignored. Numbers that
    are not valid JSON (NaN, infinite) become null in the settings, as in a policy.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor does not fit its model.
        InputError: `out` holds files already.
    """
    check_empty(out)
    config, _ = read_config(source, sizes_only=True)
    imported = _Imported(abstract_model(config), PublicTensors(source), ShardedTensors(source))
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, imported)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors" or path.name == INDEX_FILE:
            continue
        if path.name in (CONFIG_FILE, STATISTICS_FILE):
            content = read_json(path)
            if finite(content) != content:
                write_json(out / path.name, finite(content))
                continue
        shutil.copyfile(path, out / path.name)


class _Imported(Mapping[str, np.ndarray]):
    """The stored tensors, each imported on request."""

    def __init__(
        self,
        model: nnx.Module,
        tensors: PublicTensors,
        stored: Mapping[str, np.ndarray],
    ):
        self._stored = stored
        self._names = set(tensors)
        self._convert = through_flax(model, tensors, source=tensors.file_of)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            return self._stored[name]
        leaf, value = self._convert(name)
        return public_layout(name, leaf, np.asarray(jax.device_put(value)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def synthesize(config: OpenVLAConfig, out: Path, *, seed: int = 0) -> None:
    """Writes a public directory with random bfloat16 weights and statistics of unit range.

    For measurements at full size: about 15 GB for `openvla-7b`, and 0.3 GB more in `.pt` files for
    `openvla-oft-7b`. Weights are heavy-tailed, output channels differ in scale and a few inputs
    stand out, as in trained models; see `_Random`.

    Raises:
        InputError: the towers have FiLM, or `out` holds files already.
    """
    if config.use_film:
        raise InputError(f"{config.name}: towers with FiLM are not synthesized")
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    shapes = public_shapes(abstract_model(config))
    for part in _WHOLE:
        prefix = f"{part}."
        members = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
        if members:
            write_torch_zip(out / _FILES[part], _Random(members, seed))
    write_shards(out, _Random(shapes, seed))
    blocks = {"action": config.action_dim, "proprio": config.proprio_dim}
    unit = {
        block: {"q01": [-1.0] * size, "q99": [1.0] * size} for block, size in blocks.items() if size
    }
    _write_settings(dataclasses.replace(config, unnorm_key="synthetic"), {"synthetic": unit}, out)


class _Random(Mapping[str, np.ndarray]):
    """Tensors of given shapes, bfloat16.

    Entries of matrices are Student's t with 5 degrees of freedom, of deviation 0.02. The deviations
    of output channels spread around it as a log-normal does (sigma 0.5), and those of one input in
    128 are four times as large. Factors of norms are around 1, all other vectors around 0. Tensors
    of the same shape are one tensor with its first axis rolled by different amounts.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self._shapes = shapes
        rng = np.random.default_rng(seed)
        deviation = (5 / 3) ** 0.5  # of the distribution
        self._block = (0.02 / deviation * rng.standard_t(5, _BLOCK)).astype(np.float32)
        self._channels = rng.lognormal(sigma=0.5, size=_BLOCK >> 4).astype(np.float32)
        self._inputs = np.where(rng.random(_BLOCK >> 4) < 1 / 128, 4, 1).astype(np.float32)
        self._of_shape = functools.lru_cache(maxsize=4)(self._make)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        if len(shape) == 1:
            center = 1.0 if name.endswith("weight") else 0.0  # the only such weights are norms'
            start = sum(name.encode()) * 7919 % _BLOCK
            values = np.resize(np.roll(self._block, start), shape)
            return (values + np.float32(center)).astype(ml_dtypes.bfloat16)
        return np.roll(self._of_shape(shape), sum(name.encode()) * 7919, axis=0)

    def _make(self, shape: tuple[int, ...]) -> np.ndarray:
        values = np.resize(self._block, shape)
        rows = values.reshape(shape[0], -1)
        rows *= np.resize(self._channels, (shape[0], 1))
        rows *= np.resize(self._inputs, (1, rows.shape[1]))
        return values.astype(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
