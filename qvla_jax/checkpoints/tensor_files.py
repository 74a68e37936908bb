"""Sharded safetensors read and written one tensor at a time.

A file is mapped once, so thousands of tensors take one open file. A tensor's pages leave resident
memory with its last array, so memory is bounded by the tensors in use and not by the file.
"""

import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import ml_dtypes
import numpy as np
import safetensors

from qvla_jax.atomic import atomic_path, write_json
from qvla_jax.checkpoints.files import check_fetched
from qvla_jax.errors import CheckpointError
from qvla_jax.mapping import Region, map_file

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Bytes per read and write when a file is copied.
_COPY_BYTES: Final = 1 << 24
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file; arrays are read-only views of the file."""

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
            CheckpointError: the file is missing or damaged, or a tensor has an unknown dtype.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        check_fetched(path)
        try:
            # The library checks header, offsets and length; tensors are mapped here.
            with safetensors.safe_open(path, framework="numpy") as handle:
                names = list(handle.keys())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (
            safetensors.SafetensorError, OSError, ValueError, RecursionError, struct.error
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); it may be truncated: fetch it "
                "again"
            ) from error
        self.path, self._begin = path, 8 + length
        self._mapping: mmap.mmap | None = None
        self._entries = {name: header[name] for name in names}
        # The library accepts null as absent.
        self.metadata: dict[str, str] = header.get("__metadata__") or {}
        for name, entry in self._entries.items():
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}")

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        shape = tuple(entry["shape"])
        dtype = _DTYPES[entry["dtype"]]
        if not math.prod(shape):
            return np.empty(shape, dtype)
        offset, size = self._begin + entry["data_offsets"][0], math.prod(shape) * dtype.itemsize
        try:
            if self._mapping is None:
                self._mapping = map_file(self.path)
            # Reading past the end of a truncated file would kill the process.
            if (found := self.path.stat().st_size) < offset + size:
                raise ValueError(f"{found} bytes")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: gone or changed since its header was read ({error}); fetch it again"
            ) from error
        return np.asarray(Region(self._mapping, offset, size)).view(dtype).reshape(shape)

    def spec(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of a tensor, which is not read."""
        entry = self._entries[name]
        return _DTYPES[entry["dtype"]], tuple(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ShardedTensors(Mapping[str, np.ndarray]):
    """The tensors of all safetensors files of a directory."""

    def __init__(self, folder: Path):
        """Reads the headers of all files.

        Raises:
            CheckpointError: a file is missing, damaged or not in the index, or a tensor is in two
                files, in none, or not in the file given by the index.
        """
        index, single = folder / INDEX_FILE, folder / SINGLE_FILE
        weight_map: dict[str, str] | None = None
        if index.is_file():
            weight_map = _weight_map(index)
            files = sorted(set(weight_map.values()))
        elif single.is_file():
            files = [SINGLE_FILE]
        else:
            raise CheckpointError(
                f"{single}: missing, and so is {INDEX_FILE}: there are no weights"
            )
        self._files: dict[str, TensorFile] = {}
        for name in files:
            path = folder / name
            # A name with a folder in it could leave the directory.
            if Path(name).name != name or not os.path.isfile(path):
                raise CheckpointError(f"{path}: missing; the index names it")
            file = TensorFile(path)
            for key in file:
                if key in self._files:
                    raise CheckpointError(f"{path}: {key!r} stands in another file too")
                self._files[key] = file
        if weight_map is not None:
            self._check_index(weight_map, index)
        extra = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        if extra:
            listed = f"{index.name} lacks it" if weight_map else f"{SINGLE_FILE} has all weights"
            raise CheckpointError(
                f"{folder / extra[0]}: would be passed over: {listed}; take away what belongs to "
                "other weights"
            )

    def _check_index(self, weight_map: Mapping[str, str], index: Path) -> None:
        for key, name in weight_map.items():
            file = self._files.get(key)
            if file is None or file.path.name != name:
                raise CheckpointError(
                    f"{index.parent / name}: tensor {key!r} is missing, which {index.name} has "
                    f"there{'' if file is None else f'; it stands in {file.path.name}'}"
                )
        for key, file in self._files.items():
            if key not in weight_map:
                raise CheckpointError(
                    f"{file.path}: tensor {key!r} is unexpected: {index.name} lacks it"
                )

    def file_of(self, name: str) -> Path | None:
        """The file that holds a tensor; None if none does."""
        file = self._files.get(name)
        return None if file is None else file.path

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_map(index: Path) -> dict[str, str]:
    check_fetched(index)
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index ({error!r})") from error
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: weight_map: {name!r} names {file!r}, expected a file")
    return weight_map


def write_shards(
    folder: Path, tensors: Mapping[str, np.ndarray], *, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes shards and their index as public checkpoints have them.

    Args:
        folder: where to.
        tensors: read twice, one at a time: for its shape, then for its values.
        shard_bytes: a shard is closed before it grows larger, unless one tensor is.
    """
    specs = _specs(tensors)
    shards: list[list[str]] = [[]]
    for name, (_, _, size) in specs.items():
        if shards[-1] and sum(specs[n][2] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with atomic_path(folder / file_name) as temporary, temporary.open("wb") as file:
            _write_header(file, {name: specs[name] for name in names}, {"format": "pt"})
            for name in names:
                np.ascontiguousarray(tensors[name]).tofile(file)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(size for _, _, size in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def write_file(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Writes one safetensors file, completely or not at all.

    The header comes first but is known last, so tensors are written to an unnamed file first: at
    most one is in memory, and the folder needs room for twice the file.

    Args:
        path: where to.
        tensors: names and values, requested once, one at a time.
        metadata: called when all tensors have been written.
    """
    with atomic_path(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as payload:
        specs = {}
        for name, tensor in tensors:
            specs[name] = _spec(tensor)
            np.ascontiguousarray(tensor).tofile(payload)
            del tensor
        payload.seek(0)
        with temporary.open("wb") as file:
            _write_header(file, specs, metadata())
            shutil.copyfileobj(payload, file, _COPY_BYTES)


def _specs(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, list[int], int]]:
    return {name: _spec(tensors[name]) for name in tensors}


def _spec(tensor: np.ndarray) -> tuple[str, list[int], int]:
    return _NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes


def _write_header(
    file: BinaryIO, specs: Mapping[str, tuple[str, list[int], int]], metadata: Mapping[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, size) in specs.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    file.write(struct.pack("<Q", len(content)) + content)
