"""Merging low-rank adapters (LoRA, as PEFT stores them) into the weights that they adapt.

W <- W + (alpha / r) B A. A convolution's A is [r, 3, p, p] and its B [c, r, 1, 1].
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from qvla_jax.checkpoints.weights import check_shape
from qvla_jax.errors import CheckpointError

# OpenVLA-OFT trains with alpha = min(r, 16); the files do not tell it.
_MAX_ALPHA = 16
# The rank that it trains with, and what an error expects where an adapter is not there at all.
_RANK = 32
_PEFT_FILE = "adapter_model.safetensors"
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
    """Both halves of an adapter; raises unless they fit the shape of their weight."""
    channels, *inputs = weight
    a = _expect(names[0], halves[0], (rank, *inputs), source)
    b = _expect(names[1], halves[1], (channels, rank, *[1] * (len(inputs) - 1)), source)
    return a, b


def merge_inline(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """Merges `X.base_layer.weight`, `X.lora_A.default.weight`, `X.lora_B.default.weight` into X.

    Other tensors, and weights whose adapter is zero, pass through. The result is float32 where
    something was merged.

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
        CheckpointError: a file is missing or damaged, or a half of an adapter is missing, adapts
            no weight or has a shape that does not fit.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        loaded = safetensors.numpy.load_file(folder / _PEFT_FILE)
        rank = config["r"]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable PEFT adapter ({error!r})") from error
    file = str(folder / _PEFT_FILE)
    adapted: dict[str, dict[str, str]] = {}
    for name, tensor in loaded.items():
        layer, _, half = name.removeprefix(_PEFT_PREFIX).partition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise _unexpected(name, tensor, file)
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
        adapters[f"{layer}.weight"] = _checked(names, halves, weight.shape, file, rank)
    return _Adapted(tensors, adapters, scale)
