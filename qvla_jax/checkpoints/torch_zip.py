"""Reads `torch.save` files without PyTorch and without running a pickle.

A `.pt` file is an uncompressed zip archive: `<root>/data.pkl` describes tensors, and each
`<root>/data/<key>` holds the bytes of a storage. The description is interpreted by a small machine
(`plain_pickle`) that can only build dicts, lists, tuples, numbers, strings and tensors.
"""

import re
import reprlib
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from qvla_jax.checkpoints.files import check_fetched
from qvla_jax.errors import CheckpointError
from qvla_jax.mapping import mapped_bytes
from qvla_jax.plain_pickle import Global, Machine

STORAGE_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# A larger description is not that of a state dict: 1,000 tensors take 150 kB. Each byte may become
# an empty list of 60 bytes.
_MAX_DESCRIPTION: Final = 4 << 20


_ORDERED_DICT = Global("collections OrderedDict")
_REBUILD_TENSOR = Global("torch._utils _rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils _rebuild_parameter")
_STORAGES = {Global(f"torch {name}"): dtype for name, dtype in STORAGE_DTYPES.items()}
_KNOWN = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}
# Folders and files below the archive's one folder.
_NAME: Final = re.compile(r"[\w.+=@, -]+(/[\w.+=@, -]+)+", re.ASCII)


def read_torch_zip(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict.

    Args:
        path: a file written by `torch.save(state_dict)` (zip format, PyTorch 1.6 or later).

    Returns:
        Name -> array, in the file's order; nested dicts are joined by dots. Arrays are read-only
        views of the memory-mapped file.

    Raises:
        CheckpointError: the file is missing, truncated or compressed, has members that overlap or
            whose names lead elsewhere, mentions a name that tensors do not need, or describes a
            tensor outside its storage or more tensors than the storage holds.
    """
    path = Path(path)
    check_fetched(path)
    try:
        archive = _Archive(path)
        description = _Machine(archive.description(), archive.storage)
        with warnings.catch_warnings():
            # Python warns about a backslash in a name, which is refused anyway.
            warnings.simplefilter("ignore")
            tree = description.run()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (
        OSError,
        ValueError,
        KeyError,
        NotImplementedError,  # zip features that Python does not know
        RecursionError,  # a message about a value nested too deep to be printed
        zipfile.BadZipFile,
        struct.error,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable torch.save file ({reason}); it may be truncated: fetch it "
            "again"
        ) from error
    return dict(_tensors(tree, str(path)))


def _tensors(tree: Any, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """(dotted name, tensor) of all tensors, in order; walks every dict once."""
    pending, seen = [("", tree)], set()
    while pending:
        name, value = pending.pop()
        if isinstance(value, np.ndarray):
            yield name, value
            continue
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{source}: expected a dict of tensors, found {type(value).__name__} at {name!r}"
            )
        # A dict that contains itself, or is shared many times over, would be walked forever.
        if id(value) in seen:
            raise CheckpointError(f"{source}: the dict at {name!r} stands in several places")
        seen.add(id(value))
        prefix = f"{name}." if name else ""
        pending += [(f"{prefix}{k}", v) for k, v in reversed(value.items())]


class _Archive:
    """The zip container: every member is uncompressed, and none overlaps another."""

    def __init__(self, path: Path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if not members:
            raise CheckpointError("an empty archive")
        self._bytes = mapped_bytes(path)
        self._spans: dict[str, tuple[int, int]] = {}
        end_of_last = 0
        for member in sorted(members, key=lambda m: m.header_offset):
            if not self._spans and member.header_offset:
                raise CheckpointError(f"{member.header_offset} bytes stand before the archive")
            if not _NAME.fullmatch(member.filename) or ".." in member.filename.split("/"):
                raise CheckpointError(f"member {member.filename!r} has a name that leads elsewhere")
            if member.header_offset < end_of_last:
                raise CheckpointError(f"member {member.filename!r} overlaps another one")
            begin = self._data_offset(member)
            end = begin + member.file_size
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise CheckpointError(f"member {member.filename!r} is compressed or encrypted")
            if member.compress_size != member.file_size or end > size:
                raise CheckpointError(f"member {member.filename!r} reaches past the file's end")
            if member.filename in self._spans:
                raise CheckpointError(f"member {member.filename!r} stands there twice")
            end_of_last = end
            self._spans[member.filename] = (begin, end)
        roots = [n.removesuffix("/data.pkl") for n in self._spans if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"expected one data.pkl, found {len(roots)}")
        self._root = roots[0]
        order = self._spans.get(f"{self._root}/byteorder")
        if order and bytes(self._bytes[slice(*order)]) != b"little":
            raise CheckpointError("written on a big-endian machine")

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        # The local header repeats the name and has its own extra field (torch pads with it).
        header = bytes(self._bytes[member.header_offset : member.header_offset + 30])
        signature, length, extra = struct.unpack("<4s22xHH", header)
        if signature != b"PK\x03\x04":
            raise CheckpointError(f"member {member.filename!r} has no local header")
        begin = member.header_offset + 30
        name = bytes(self._bytes[begin : begin + length])
        if name != member.filename.encode():
            raise CheckpointError(f"member {member.filename!r} is called {name!r} where it lies")
        return begin + length + extra

    def description(self) -> bytes:
        begin, end = self._spans[f"{self._root}/data.pkl"]
        if end - begin > _MAX_DESCRIPTION:
            raise CheckpointError(f"a description of {end - begin} bytes")
        return self._bytes[begin:end].tobytes()

    def storage(self, key: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        if not re.fullmatch(r"\d{1,9}", key):
            raise CheckpointError(f"storage key {key[:40]!r} is not a number")
        name = f"{self._root}/data/{key}"
        if name not in self._spans:
            raise CheckpointError(f"storage {key} is missing")
        begin, end = self._spans[name]
        if end - begin != count * dtype.itemsize:
            raise CheckpointError(
                f"storage {key} holds {end - begin} bytes, {count} x {dtype} were announced"
            )
        return self._bytes[begin:end].view(dtype)


class _Machine(Machine):
    """Interprets the description: what it refers to besides plain data are tensors' parts."""

    error = CheckpointError
    what = "description"
    whole = "a state dict"
    operations = _MAX_DESCRIPTION

    def __init__(
        self, description: bytes, storage: Callable[[str, np.dtype[Any], int], np.ndarray]
    ):
        super().__init__(description)
        self._storage = storage
        # Storage -> the different views of it.
        self._views: dict[int, dict[tuple[Any, ...], int]] = {}

    def _known(self, name: str) -> Global:
        if Global(name) not in _KNOWN:
            raise CheckpointError(f"refuses the name {name!r}: tensors do not need it")
        return Global(name)

    def _op_binpersid(self, _: None) -> None:
        reference = self._pop()
        match reference:
            case ("storage", Global() as kind, str(key), str(), int(count)) if kind in _STORAGES:
                self._push(self._storage(key, _STORAGES[kind], count))
            case _:
                raise CheckpointError("a reference that is not one to a storage")

    def _op_reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case Global(_ORDERED_DICT.name), ():
                self._push({})
            case Global(_REBUILD_TENSOR.name), (np.ndarray() as storage, offset, size, stride, *_):
                tensor = _tensor(storage, offset, size, stride)
                # A storage is a view of the file, identified by its address.
                views = self._views.setdefault(storage.__array_interface__["data"][0], {})
                views[storage.dtype, offset, size, stride] = tensor.nbytes
                if sum(views.values()) > storage.nbytes:
                    raise CheckpointError(
                        f"tensors that overlap in their storage of {storage.size}, such as one of "
                        f"size {size} at {offset}"
                    )
                self._push(tensor)
            case Global(_REBUILD_PARAMETER.name), (np.ndarray() as tensor, *_):
                self._push(tensor)
            case _:
                raise CheckpointError(f"refuses to call {reprlib.repr(function)}")

    def _op_build(self, _: None) -> None:
        # A state dict carries `_metadata` (versions of its modules), which no tensor needs.
        state = self._pop()
        self._top(dict)
        if not (isinstance(state, dict) and set(state) <= {"_metadata"}):
            raise CheckpointError("refuses to set attributes")


def _tensor(storage: np.ndarray, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A view of a storage, entirely inside it and with each element used at most once."""
    if (
        not (isinstance(size, tuple) and isinstance(stride, tuple))
        or len(size) != len(stride)
        or len(size) > 8
        or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    ):
        # What is nested may take forever to be printed whole.
        numbers = (reprlib.repr(n) for n in (size, stride, offset))
        raise CheckpointError("a tensor of size {}, stride {}, offset {}".format(*numbers))
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if count > storage.size or last >= max(storage.size, 1):
        raise CheckpointError(
            f"a tensor of size {tuple(size)}, stride {tuple(stride)} at {offset} reaches outside "
            f"its storage of {storage.size}"
        )
    reach = 1
    for n, step in sorted(zip(size, stride, strict=True), key=lambda axis: axis[1]):
        if n > 1 and step < reach and count:
            raise CheckpointError(f"a tensor of size {size}, stride {stride} overlaps itself")
        reach += (n - 1) * step
    return np.lib.stride_tricks.as_strided(
        storage[offset:], size, [s * storage.itemsize for s in stride], writeable=False
    )
