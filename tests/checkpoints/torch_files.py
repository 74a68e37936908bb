"""Writes files as `torch.save` does, with the standard pickle and zipfile modules."""

import collections
import io
import pickle
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Name:
    """Pickled as a global of another module, as `torch.save` would write it."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self):  # the pickler insists on a callable for REDUCE
        raise AssertionError


class Storage:
    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Tensor:
    def __init__(self, storage: Storage, offset: object, size: object, stride: object):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())


class _Pickler(pickle._Pickler):
    """Writes `_Name`, `_Storage` and `_Tensor` as torch does."""

    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = Name("torch", STORAGES[str(value.array.dtype)])
            return ("storage", kind, value.key, "cpu", value.array.size)
        return None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            return self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        if isinstance(value, Tensor):
            self.save(Name("torch._utils", "_rebuild_tensor_v2"))
            self.save(value.arguments)
            return self.write(pickle.REDUCE)
        return super().save(value, save_persistent_id)


def dumps(tree: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def write(path, description: bytes, storages: dict[str, bytes], *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def save(path, tensors: dict[str, np.ndarray], **options):
    storages = {name: Storage(str(i), array) for i, (name, array) in enumerate(tensors.items())}
    tree = collections.OrderedDict(
        (
            name,
            Tensor(
                storages[name], 0, array.shape, tuple(s // array.itemsize for s in array.strides)
            ),
        )
        for name, array in tensors.items()
    )
    data = {s.key: s.array.tobytes() for s in storages.values()}
    return write(path, dumps(tree), data, **options)
