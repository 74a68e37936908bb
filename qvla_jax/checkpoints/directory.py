"""All tensors of a public directory as one mapping, each of which knows its file."""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from qvla_jax.checkpoints.lora import merge_adapter, merge_inline
from qvla_jax.checkpoints.tensor_files import INDEX_FILE, ShardedTensors
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError

# Parts that may lie in a file of their own, which then replaces what the weights hold of them, and
# what the file is called.
COMPONENTS: Final = {
    "action_head": "action_head--*_checkpoint.pt",
    "proprio_projector": "proprio_projector--*_checkpoint.pt",
    "vision_backbone": "vision_backbone--*_checkpoint.pt",
    "action_decoder": "action_decoder*.pt",
}
_ADAPTER: Final = "lora_adapter"


class PublicTensors(Mapping[str, np.ndarray]):
    """The tensors of a directory under the names of `qvla_jax.models`, LoRA merged.

    Weights are mapped when they are asked for, components (`.pt`) at once. Adapters inside a
    component are merged at once, too.
    """

    def __init__(self, folder: Path):
        """Reads components and the headers of the weights.

        Raises:
            CheckpointError: a file is missing, damaged or refused, or an adapter does not fit.
        """
        self._weights = ShardedTensors(folder)
        index = folder / INDEX_FILE
        self._listing = index if index.is_file() else folder / "model.safetensors"
        self._parts: dict[str, Path] = {}  # component -> file
        self._files: dict[str, Path] = {}  # tensor of a component -> file
        components: dict[str, np.ndarray] = {}
        rest: Mapping[str, np.ndarray] = self._weights
        for component in COMPONENTS:
            path = component_file(folder, component)
            if path is None:
                continue
            prefix = "" if component == "vision_backbone" else f"{component}."
            loaded = {
                f"{prefix}{name.removeprefix('module.')}": tensor
                for name, tensor in read_torch_zip(path).items()
            }
            merged = merge_inline(loaded, source=str(path))
            components |= merged
            self._files |= dict.fromkeys(merged, path)
            self._parts[component] = path
            rest = _Without(rest, f"{component}.")
        joined: Mapping[str, np.ndarray] = collections.ChainMap(components, rest)  # type: ignore[arg-type]
        adapter = folder / _ADAPTER
        self._tensors = merge_adapter(joined, adapter) if adapter.is_dir() else joined

    def file_of(self, name: str) -> str:
        """The file that a tensor stands in or, if it stands in none, that should hold it."""
        part = self._parts.get(name.partition(".")[0])
        return str(self._files.get(name) or part or self._weights.file_of(name) or self._listing)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Without(Mapping[str, np.ndarray]):
    """A mapping without the names that begin with a prefix."""

    def __init__(self, inner: Mapping[str, np.ndarray], prefix: str):
        self._inner = inner
        self._names = [name for name in inner if not name.startswith(prefix)]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def component_file(folder: Path, name: str) -> Path | None:
    """The `.pt` file of a component; None if the directory has none.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(folder.glob(COMPONENTS[name]))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several {name} files: {[p.name for p in found]}")
    return found[0] if found else None


def component_shape(path: Path, name: str, *, dims: int) -> tuple[int, ...]:
    """Shape of a component's tensor that tells a size of the policy.

    Raises:
        CheckpointError: the tensor is missing or has another number of dimensions.
    """
    tensor = next(
        (t for n, t in read_torch_zip(path).items() if n.removeprefix("module.") == name), None
    )
    if tensor is None:
        raise CheckpointError(f"{path}: tensor {name!r} with {dims} dimensions is missing")
    if tensor.ndim != dims:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {tensor.shape}, expected {dims} dimensions"
        )
    return tensor.shape
