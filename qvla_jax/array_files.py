"""Named arrays and a JSON header in one `.safetensors` or `.npz` file."""

import importlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qvla_jax.atomic import atomic_path
from qvla_jax.errors import InputError

_VERSION = 1
_HEADER = "header"
_SUFFIXES = (".npz", ".safetensors")


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    header: Mapping[str, object],
    *,
    kind: str,
) -> None:
    """Writes `arrays` and `header` to `path`, completely or not at all.

    Args:
        path: ends in `.safetensors` or `.npz`, which decides the format.
        arrays: numbers only; nothing is pickled.
        header: JSON types.
        kind: type of the file, which `read_arrays` checks.

    Raises:
        InputError: the suffix is not one of these.
    """
    suffix = _suffix(path)
    text = json.dumps({"kind": kind, "version": _VERSION, **header})
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        if suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **contiguous, **{_HEADER: np.array(text)})
        else:
            safetensors: Any = importlib.import_module("safetensors.numpy")
            try:
                safetensors.save_file(contiguous, temporary, metadata={_HEADER: text})
            except importlib.import_module("safetensors").SafetensorError as error:
                # A full disk, in the library's words.
                raise OSError(str(error)) from error


def read_arrays(
    path: str | os.PathLike[str], *, kind: str, required: Iterable[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Reads what `write_arrays` wrote.

    Args:
        path: a `.safetensors` or `.npz` file.
        kind: expected type of the file.
        required: arrays that must be there.

    Returns:
        The arrays by name, and the header.

    Raises:
        InputError: the file is missing, damaged, of another kind or version, or lacks a required
            array.
    """
    name = os.fspath(path)
    reader = _read_npz if _suffix(path) == ".npz" else _read_safetensors
    if not Path(path).is_file():
        raise InputError(f"{name}: there is no such file.")
    try:
        arrays, text = reader(Path(path))
        header: Any = json.loads(text)
    except (
        OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, NotImplementedError,
        RecursionError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(f"{name}: the file is damaged or not of this library: {error}.") from error
    fields = cast("dict[str, Any]", header if isinstance(header, dict) else {})
    if fields.get("kind") != kind:
        raise InputError(f"{name}: expected a file of kind {kind!r}, got header {text[:200]!r}.")
    if fields.get("version") != _VERSION:
        raise InputError(
            f"{name}: version {fields.get('version')!r} of the format is unknown here; expected "
            f"{_VERSION}. Write the file again with this version of the library."
        )
    missing = [key for key in required if key not in arrays]
    if missing:
        raise InputError(f"{name}: the arrays {missing} are missing; it has {sorted(arrays)}.")
    return arrays, fields


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise InputError(f"{os.fspath(path)}: the name must end in one of {', '.join(_SUFFIXES)}.")
    return suffix


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of an `.npy` file's content.

    Nothing is allocated before its bytes are read: `numpy.load` trusts the declared shape.

    Raises:
        ValueError: it is damaged, or holds something other than numbers, booleans or text.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of .npy")
        first = version == (1, 0)
        read: Any = (
            np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream)
    except ValueError:
        raise
    except Exception as error:  # its header is evaluated as Python literals
        raise ValueError(f"no header of .npy ({type(error).__name__})") from error
    body = bytearray(memoryview(content)[stream.tell() :])
    if dtype.kind not in "biufUS" or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"{len(body)} bytes for {dtype} of shape {shape}")
    return np.ndarray(shape, dtype, buffer=body, order="F" if fortran else "C")


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    arrays: dict[str, NDArray[Any]] = {}
    left = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # Compressed ones would take more memory than the file has bytes.
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise ValueError(f"{member.filename} is compressed or encrypted")
            # Sizes come from the archive: reserve no more than the file has bytes.
            left -= member.file_size
            if left < 0 or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename} reaches past the file's end")
            arrays[member.filename.removesuffix(".npy")] = read_npy(archive.read(member))
    return arrays, str(arrays.pop(_HEADER))


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    safetensors: Any = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays: dict[str, NDArray[Any]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    return arrays, metadata[_HEADER]
