"""All tensors of a public directory as one mapping, with the file of each."""

import collections
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from qvla_jax.checkpoints.tensor_files import INDEX_FILE, ShardedTensors
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError, CheckpointWarning
from qvla_jax.families import family
from qvla_jax.families.prismatic.checkpoint.components import (
    COMPONENTS,
    check_tensor_files,
    component_file,
)
from qvla_jax.families.prismatic.checkpoint.lora import merge_adapter, merge_inline
from qvla_jax.families.prismatic.checkpoint.weight_files import (
    ADAPTER_FOLDER,
    adapter_folders,
    check_weights,
)

# Buffers that older versions of the public code stored; it recomputes and ignores them.
_IGNORED: Final = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.position_ids$")


class PublicTensors(family.PublicTensors):
    """The tensors of a directory under the names of `qvla_jax.models`.

    Weights are mapped on request, components (`.pt`) immediately. Adapters inside a component are
    merged immediately, too, as the public code does on loading. An adapter in a folder next to the
    weights is already part of them: the public scripts that write both have merged it.
    """

    def __init__(self, folder: Path, *, merge: bool = False):
        """Reads components and the headers of the weights.

        Args:
            folder: a public directory.
            merge: the weights are the base of `lora_adapter/`, which is merged as they are read.

        Raises:
            CheckpointError: a file is missing, damaged or refused, or an adapter does not fit.

        Warns:
            CheckpointWarning: an adapter is ignored.
        """
        check_weights(folder)
        self._weights = ShardedTensors(folder)
        check_tensor_files(folder)
        index = folder / INDEX_FILE
        self._listing = index if index.is_file() else folder / "model.safetensors"
        self._parts: dict[str, Path] = {}  # component -> file
        self._files: dict[str, Path] = {}  # tensor of a component -> file
        components: dict[str, np.ndarray] = {}
        rest: Mapping[str, np.ndarray] = _Without(self._weights, _IGNORED.search)
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
            rest = _Without(rest, re.compile(rf"{component}\.").match)
        adapters = adapter_folders(folder)
        if merge:
            if not (folder / ADAPTER_FOLDER).is_dir():
                raise CheckpointError(
                    f"{folder}: merge_adapter: there is no {ADAPTER_FOLDER}/ to merge"
                )
            # A component file holds its own adapters.
            rest = merge_adapter(rest, folder / ADAPTER_FOLDER, replaced=tuple(self._parts))
        elif adapters:
            warnings.warn(
                f"{adapters[0]}: left alone, because the weights beside it ({self._listing.name}) "
                "hold it already where OpenVLA-OFT's scripts wrote them; if they are its base, "
                "load with merge_adapter=True",
                CheckpointWarning,
                stacklevel=3,
            )
        self._tensors = collections.ChainMap(components, rest)  # type: ignore[arg-type]

    def file_of(self, name: str) -> str:
        """The file that holds a tensor or, if none does, the file that should."""
        part = self._parts.get(name.partition(".")[0])
        return str(self._files.get(name) or part or self._weights.file_of(name) or self._listing)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Without(Mapping[str, np.ndarray]):
    """A mapping without some names."""

    def __init__(
        self, inner: Mapping[str, np.ndarray], drop: Callable[[str], re.Match[str] | None]
    ):
        self._inner = inner
        self._names = dict.fromkeys(name for name in inner if not drop(name))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def component_names(path: Path) -> list[str]:
    """Names of a component's tensors."""
    return [name.removeprefix("module.") for name in read_torch_zip(path)]


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
