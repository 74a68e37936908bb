"""Writes state dicts as `torch.save` does, without PyTorch.

The counterpart of `torch_zip`: an uncompressed zip archive whose `data.pkl` names a storage for
each tensor. The description is written opcode by opcode, with only the names that a state dict
needs, so that `torch.load(..., weights_only=True)` accepts it.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvla_jax.atomic import atomic_path
from qvla_jax.checkpoints.torch_zip import STORAGE_DTYPES

_STORAGES: Final = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
# Storages begin at multiples of this, as PyTorch requires for mapping; an extra field of this kind
# fills the gap.
_ALIGNMENT: Final = 64
_PADDING: Final = 0x4246
_LOCAL_HEADER: Final = 30
_EXTRA_HEADER: Final = 4
_ZIP64_EXTRA: Final = 20
# The same in every file, so that equal tensors give equal bytes.
_DATE: Final = (1980, 1, 1, 0, 0, 0)


def write_torch_zip(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict, atomically and one tensor at a time.

    Args:
        path: by custom `*.pt`.
        tensors: name -> tensor, read twice: for its shape, then for its values.

    Raises:
        ValueError: PyTorch's state dicts do not support a dtype.
    """
    path = Path(path)
    root = path.stem
    specs = {name: (tensors[name].dtype, tensors[name].shape) for name in tensors}
    for name, (dtype, _) in specs.items():
        if dtype not in _STORAGES:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which is not written")
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        _member(archive, f"{root}/data.pkl", b"".join(_description(specs)))
        _member(archive, f"{root}/byteorder", b"little")
        for key, name in enumerate(specs):
            data = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
            _member(archive, f"{root}/data/{key}", data.data)
        _member(archive, f"{root}/version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Stores a member whose data begin at a multiple of the alignment."""
    assert archive.fp is not None
    large = len(data) >= zipfile.ZIP64_LIMIT / 2
    begin = archive.fp.tell() + _LOCAL_HEADER + len(name.encode()) + _EXTRA_HEADER
    padding = -(begin + (_ZIP64_EXTRA if large else 0)) % _ALIGNMENT
    info = zipfile.ZipInfo(name, _DATE)
    info.extra = struct.pack("<HH", _PADDING, padding) + bytes(padding)
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=large) as file:
        file.write(data)


def _description(
    specs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
) -> Iterator[bytes]:
    """The pickle of OrderedDict(name -> tensor)."""
    empty_ordered_dict = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.PROTO + b"\x02" + empty_ordered_dict + pickle.MARK
    for key, (name, (dtype, shape)) in enumerate(specs.items()):
        count = math.prod(shape)
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = (
            pickle.MARK
            + _text("storage")
            + _name("torch", _STORAGES[dtype])
            + _text(str(key))
            + _text("cpu")
            + _integer(count)
            + pickle.TUPLE
            + pickle.BINPERSID
        )
        yield _text(name) + _name("torch._utils", "_rebuild_tensor_v2")
        yield pickle.MARK + storage + _integer(0) + _integers(shape) + _integers(strides)
        yield pickle.NEWFALSE + empty_ordered_dict + pickle.TUPLE + pickle.REDUCE
    yield pickle.SETITEMS + pickle.STOP


def _name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
