"""Merging low-rank adapters (LoRA, as PEFT stores them) into the weights that they adapt.

W <- W + (alpha / r) B A. A convolution's A is [r, 3, p, p] and its B [c, r, 1, 1].
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from qvla_jax.errors import CheckpointError

# OpenVLA-OFT trains with alpha = min(r, 16); the files do not tell it.
_MAX_ALPHA = 16


def low_rank(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """B A in float32, in the shape of the weight."""
    product = b.reshape(len(b), -1).astype(np.float32) @ a.reshape(len(a), -1).astype(np.float32)
    return product.reshape(shape)


def merge_inline(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """Merges `X.base_layer.weight`, `X.lora_A.default.weight`, `X.lora_B.default.weight` into X.

    Other tensors, and weights whose adapter is zero, pass through. The result is float32 where
    something was merged.

    Raises:
        CheckpointError: an adapter has no base, or only one of its halves.
    """
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            base = name.split(".lora_")[0]
            if f"{base}.base_layer.weight" not in tensors:
                raise CheckpointError(f"{source}: adapter {name!r} has no base layer")
            continue
        layer, is_base, leaf = name.partition(".base_layer.")
        if is_base and leaf == "weight":
            halves = [tensors.get(f"{layer}.lora_{half}.default.weight") for half in "AB"]
            a, b = halves
            if a is None or b is None:
                raise CheckpointError(f"{source}: {layer!r} lacks a half of its adapter")
            scale = min(len(a), _MAX_ALPHA) / len(a)
            if not b.any():  # adds nothing: the weight passes bit for bit, zeros' signs included
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
        adapters: Mapping[str, tuple[np.ndarray, np.ndarray]],
        scale: float,
    ):
        self._tensors, self._adapters, self._scale = tensors, adapters, scale

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if name not in self._adapters:
            return tensor
        delta = self._scale * low_rank(*self._adapters[name], tensor.shape)
        return (tensor.astype(np.float32) + delta).astype(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def merge_adapter(tensors: Mapping[str, np.ndarray], folder: Path) -> Mapping[str, np.ndarray]:
    """Merges a PEFT adapter directory (adapter_config.json, adapter_model.safetensors).

    Merged weights keep their dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter fits no weight.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        loaded = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        rank = config["r"]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable PEFT adapter ({error!r})") from error
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in loaded.items():
        layer, _, half = name.removeprefix("base_model.model.").partition(".lora_")
        halves.setdefault(f"{layer}.weight", {})[half[:1]] = tensor
    for name, pair in halves.items():
        if name not in tensors or set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder}: the adapter of {name!r} fits no weight")
    adapters = {name: (pair["A"], pair["B"]) for name, pair in halves.items()}
    return _Adapted(tensors, adapters, scale)
