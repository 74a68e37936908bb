"""Written `.pt` files, read by Python's own pickle and zipfile, and by our reader."""

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvla_jax.checkpoints.torch_writer import write_torch_zip
from qvla_jax.checkpoints.torch_zip import read_torch_zip

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}


class _Unpickler(pickle.Unpickler):
    """What PyTorch makes of the names, with arrays for tensors."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        assert module == "torch"
        return DTYPES[name]

    def persistent_load(self, reference):
        kind, dtype, key, location, count = reference
        assert (kind, location) == ("storage", "cpu")
        storage = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype)
        assert len(storage) == count
        return storage

    @staticmethod
    def _rebuild(storage, offset, size, stride, requires_grad, hooks):
        assert (requires_grad, hooks) == (False, collections.OrderedDict())
        return np.lib.stride_tricks.as_strided(
            storage[offset:], size, [s * storage.itemsize for s in stride]
        )


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*DTYPES.values()]),
            st.lists(st.integers(0, 4), max_size=4),
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        ),
        max_size=5,
        unique_by=lambda part: part[2],
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_python_reads_what_is_written(tmp_path, parts):
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 9, shape).astype(dtype) for dtype, shape, name in parts}
    path = tmp_path / "head--5_checkpoint.pt"
    write_torch_zip(path, tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        theirs = _Unpickler(archive, path.stem).load()
        assert {f"{path.stem}/version", f"{path.stem}/byteorder"} <= set(archive.namelist())
    assert isinstance(theirs, collections.OrderedDict)
    ours = read_torch_zip(path)
    assert list(theirs) == list(ours) == list(tensors)
    for name, tensor in tensors.items():
        for read in (theirs[name], ours[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.tobytes() == tensor.tobytes()


def test_storages_are_aligned_and_files_are_reproducible(tmp_path):
    tensors = {f"a{i}": np.arange(i, dtype=np.float32) for i in range(9)}
    for folder in ("one", "two"):
        write_torch_zip(tmp_path / folder / "m.pt", tensors)
    content = (tmp_path / "one" / "m.pt").read_bytes()
    assert content == (tmp_path / "two" / "m.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "one" / "m.pt") as archive:
        for member in archive.infolist():
            header = content[member.header_offset :][:30]
            lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
            assert (member.header_offset + 30 + sum(lengths)) % 64 == 0, member


def test_views_are_written_in_order_and_unknown_dtypes_refused(tmp_path):
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_torch_zip(tmp_path / "m.pt", {"t": transposed})
    np.testing.assert_array_equal(read_torch_zip(tmp_path / "m.pt")["t"], transposed)
    with pytest.raises(ValueError, match="'c' has dtype complex64"):
        write_torch_zip(tmp_path / "c.pt", {"c": np.zeros(1, np.complex64)})
    assert not (tmp_path / "c.pt").exists()
