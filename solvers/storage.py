"""Named arrays and a JSON header in one `.safetensors` or `.npz` file."""

import importlib
import json
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
        path: Ends in `.safetensors` or `.npz`, which decides the format.
        arrays: Numbers only; nothing is pickled.
        header: Whatever JSON can hold.
        kind: What the file is, checked again by `read_arrays`.

    Raises:
        InputError: The suffix is another one.
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
            safetensors.save_file(contiguous, temporary, metadata={_HEADER: text})


def read_arrays(
    path: str | os.PathLike[str], *, kind: str, required: Iterable[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Reads what `write_arrays` wrote.

    Args:
        path: A `.safetensors` or `.npz` file.
        kind: What the file must be.
        required: Arrays that must be there.

    Returns:
        The arrays by name, and the header.

    Raises:
        InputError: The file is missing, damaged, of another kind or version, or lacks a required
            array.
    """
    name = os.fspath(path)
    reader = _read_npz if _suffix(path) == ".npz" else _read_safetensors
    if not Path(path).is_file():
        raise InputError(f"{name}: there is no such file.")
    try:
        arrays, text = reader(Path(path))
        header: Any = json.loads(text)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
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


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    # numpy leaves a file open that it opened itself and cannot read.
    with path.open("rb") as stream:
        file: Any = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
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
