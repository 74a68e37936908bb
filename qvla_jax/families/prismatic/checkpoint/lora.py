"""Merges low-rank adapters (LoRA, as PEFT stores them) into the weights that they adapt.

W <- W + (alpha / r) B A. A convolution's A is [r, 3, p, p] and its B [c, r, 1, 1].
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.checkpoints.declared import check_declared, shown
from qvla_jax.checkpoints.files import read_json
from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.checkpoints.weights import check_shape
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.keys import ADAPTER
from qvla_jax.families.prismatic.checkpoint.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
)

# OpenVLA-OFT trains with alpha = min(r, 16); the files do not say.
_MAX_ALPHA = 16
# Its training rank, which errors expect if an adapter is missing.
_RANK = 32
_PEFT_PREFIX = "base_model.model."


def low_rank(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """B A in float32, in the shape of the weight."""
    product = b.reshape(len(b), -1).astype(np.float32) @ a.reshape(len(a), -1).astype(np.float32)
    return product.reshape(shape)


def _expect(
    name: str, tensor: np.ndarray | None, expected: tuple[int, ...], source: str
) -> np.ndarray:
    """The tensor, if it is there and has the expected shape."""
    if tensor is None:
        raise CheckpointError(f"{source}: tensor {name!r} of shape {expected} is missing")
    check_shape(name, tensor, expected, source)
    return tensor


def _unexpected(name: str, tensor: np.ndarray, source: str) -> CheckpointError:
    return CheckpointError(f"{source}: tensor {name!r} of shape {tensor.shape} is unexpected")


def _checked(
    names: tuple[str, str],
    halves: tuple[np.ndarray | None, np.ndarray | None],
    weight: tuple[int, ...],
    source: str,
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Both halves of an adapter; raises an error unless they fit the shape of their weight."""
    channels, *inputs = weight
    a = _expect(names[0], halves[0], (rank, *inputs), source)
    b = _expect(names[1], halves[1], (channels, rank, *[1] * (len(inputs) - 1)), source)
    return a, b


def merge_inline(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """Merges `X.base_layer.weight`, `X.lora_A.default.weight`, `X.lora_B.default.weight` into X.

    Other tensors, and weights whose adapter is zero, pass through. Merged tensors are float32.

    Raises:
        CheckpointError: an adapter has no base, only one of its halves, or one of a shape that
            does not fit.
    """
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            base, _, half = name.partition(".lora_")
            if half not in ("A.default.weight", "B.default.weight"):
                raise _unexpected(name, tensor, source)
            if f"{base}.base_layer.weight" not in tensors:
                raise CheckpointError(
                    f"{source}: tensor {f'{base}.base_layer.weight'!r} is missing, which {name!r} "
                    f"of shape {tensor.shape} adapts"
                )
            continue
        layer, is_base, leaf = name.partition(".base_layer.")
        if is_base and leaf == "weight":
            names = (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight")
            halves = (tensors.get(names[0]), tensors.get(names[1]))
            rank = next(
                (h.shape[axis] for axis, h in enumerate(halves) if h is not None and h.ndim > axis),
                _RANK,
            )
            a, b = _checked(names, halves, tensor.shape, source, rank)
            scale = min(rank, _MAX_ALPHA) / rank
            if not b.any():  # adds nothing: the weight passes bit for bit, including signs of zeros
                merged[f"{layer}.{leaf}"] = tensor
                continue
            tensor = tensor.astype(np.float32) + scale * low_rank(a, b, tensor.shape)
        merged[f"{layer}.{leaf}" if is_base else name] = tensor
    return merged


class _Adapted(Mapping[str, np.ndarray]):
    """Tensors with adapters merged as each one is read."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        adapters: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    ):
        self._tensors, self._adapters = tensors, adapters

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if name not in self._adapters:
            return tensor
        a, b, scale = self._adapters[name]
        delta = scale * low_rank(a, b, tensor.shape)
        return (tensor.astype(np.float32) + delta).astype(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of each layer in an `adapter_config.json`."""

    file: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rank_stabilized: bool
    targets: Any

    @classmethod
    def read(cls, path: Path) -> "_Settings":
        raw = read_json(path)
        check_declared(raw, ADAPTER, str(path), off_passes=True)
        if "r" not in raw:
            raise CheckpointError(f"{path}: 'r', the rank, is missing: not a PEFT adapter")
        patterns = {}
        for key in ("rank_pattern", "alpha_pattern"):
            patterns[key] = raw.get(key) or {}
            if not isinstance(patterns[key], dict):
                raise CheckpointError(f"{path}: {key!r} is {shown(raw[key])}, expected an object")
        stabilized = raw.get("use_rslora") or False
        if not isinstance(stabilized, bool):
            raise CheckpointError(f"{path}: 'use_rslora' is {shown(stabilized)}, expected a bool")
        settings = cls(
            file=str(path),
            rank=raw["r"],
            alpha=raw.get("lora_alpha", 8),
            ranks=patterns["rank_pattern"],
            alphas=patterns["alpha_pattern"],
            rank_stabilized=stabilized,
            targets=raw.get("target_modules"),
        )
        for key, value in (("r", settings.rank), *settings.ranks.items()):
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{path}: {key!r}: {shown(value)} is no rank")
        for key, value in (("lora_alpha", settings.alpha), *settings.alphas.items()):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise CheckpointError(f"{path}: {key!r}: {shown(value)} is no number")
        return settings

    def of(self, layer: str) -> tuple[int, float]:
        """Rank of a layer's adapter, and the factor of its product.

        Raises:
            CheckpointError: the settings do not adapt this layer, or a pattern is not a regular
                expression.
        """
        if not self._is_target(layer):
            raise CheckpointError(
                f"{self.file}: 'target_modules' is {shown(self.targets)}, which does not name "
                f"{layer!r}, but there is an adapter for it"
            )
        rank_key, alpha_key = (self._pattern(keys, layer) for keys in (self.ranks, self.alphas))
        if None not in (rank_key, alpha_key) and rank_key != alpha_key:
            raise CheckpointError(
                f"{self.file}: 'rank_pattern' has {rank_key!r} for {layer!r}, and 'alpha_pattern' "
                f"has {alpha_key!r}: versions of PEFT differ in what they make of it; use one key"
            )
        rank = self.rank if rank_key is None else self.ranks[rank_key]
        alpha = self.alpha if alpha_key is None else self.alphas[alpha_key]
        return rank, alpha / (rank**0.5 if self.rank_stabilized else rank)

    def _pattern(self, keys: Iterable[str], layer: str) -> str | None:
        """The first key that is the layer's path, or an expression for the end of it."""
        return next((key for key in keys if self._ends(key, layer)), None)

    def _ends(self, key: str, layer: str) -> bool:
        try:
            return key == layer or re.match(rf"(.*\.)?({key})$", layer) is not None
        except re.error as error:
            raise CheckpointError(f"{self.file}: {key!r} is no expression ({error})") from error

    def _is_target(self, layer: str) -> bool:
        if self.targets in (None, "all-linear"):
            return True
        if isinstance(self.targets, list):
            return any(isinstance(t, str) and f".{layer}".endswith(f".{t}") for t in self.targets)
        if not isinstance(self.targets, str):
            return False
        try:
            return re.fullmatch(self.targets, layer) is not None
        except re.error as error:
            raise CheckpointError(
                f"{self.file}: 'target_modules': {self.targets!r} is no expression ({error})"
            ) from error


def merge_adapter(
    tensors: Mapping[str, np.ndarray], folder: Path, *, replaced: tuple[str, ...] = ()
) -> Mapping[str, np.ndarray]:
    """Merges a PEFT adapter directory (adapter_config.json, adapter_model.safetensors).

    Merged weights keep their dtype.

    Args:
        tensors: tensors of the base.
        folder: folder of the adapter.
        replaced: parts of the model that are not merged, because other files hold them.

    Raises:
        CheckpointError: a file is missing or damaged, a setting is not supported, or a half of an
            adapter is missing, adapts no weight or has a shape that does not fit.
    """
    settings = _Settings.read(folder / ADAPTER_CONFIG)
    loaded = TensorFile(folder / ADAPTER_WEIGHTS)
    file = str(folder / ADAPTER_WEIGHTS)
    adapted: dict[str, dict[str, str]] = {}
    for name, tensor in loaded.items():
        layer, _, half = name.removeprefix(_PEFT_PREFIX).partition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise _unexpected(name, tensor, file)
        if layer.partition(".")[0] not in replaced:
            adapted.setdefault(layer, {})[half[0]] = name
    adapters = {}
    for layer, present in adapted.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is None:
            name = next(iter(present.values()))
            raise CheckpointError(
                f"{file}: tensor {name!r} of shape {loaded[name].shape} is unexpected: there is no "
                f"{f'{layer}.weight'!r} that it adapts"
            )
        names = (f"{_PEFT_PREFIX}{layer}.lora_A.weight", f"{_PEFT_PREFIX}{layer}.lora_B.weight")
        halves = (loaded.get(names[0]), loaded.get(names[1]))
        rank, scale = settings.of(layer)
        adapters[f"{layer}.weight"] = (*_checked(names, halves, weight.shape, file, rank), scale)
    return _Adapted(tensors, adapters)
