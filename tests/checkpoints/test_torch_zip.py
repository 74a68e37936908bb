"""Files are made with the standard pickle and zipfile modules, never with PyTorch."""

import contextlib
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError

from .torch_files import Storage, Tensor, dumps, save, write


def tree_with(tensor: Tensor) -> bytes:
    return dumps({"w": tensor})


@pytest.fixture
def storage():
    return Storage("0", np.arange(6, dtype=np.float32))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int64]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_tensors_come_back_bit_for_bit(tmp_path, parts):
    rng = np.random.default_rng(0)
    tensors = {
        f"module.layer{i}.weight": rng.integers(-9, 9, shape).astype(dtype)
        for i, (dtype, shape) in enumerate(parts)
    }
    read = read_torch_zip(save(tmp_path / "m.pt", tensors))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_transposed_and_offset_views_and_nested_dicts(tmp_path, storage):
    tree = {"model": {"t": Tensor(storage, 0, (2, 2), (1, 2)), "o": Tensor(storage, 4, (2,), (1,))}}
    path = write(tmp_path / "m.pt", dumps(tree), {"0": storage.array.tobytes()})
    read = read_torch_zip(path)
    np.testing.assert_array_equal(read["model.t"], storage.array[:4].reshape(2, 2).T)
    np.testing.assert_array_equal(read["model.o"], [4.0, 5.0])
    with pytest.raises(ValueError, match="read-only"):
        read["model.o"][0] = 1


class _Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "evil",
    [
        _Evil(os.system, "touch {marker}"),
        _Evil(eval, "open('{marker}', 'w')"),
        _Evil(getattr, os, "system"),
        {"nested": [({"deep": _Evil(os.system, "touch {marker}")},)]},
    ],
    ids=["system", "eval", "getattr", "nested"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_runs_and_the_name_is_told(tmp_path, evil, protocol):
    marker = tmp_path / "pwned"
    if isinstance(evil, _Evil):
        evil.arguments = tuple(
            a.format(marker=marker) if isinstance(a, str) else a for a in evil.arguments
        )
        if os in evil.arguments:
            evil.arguments = ("os", "system")
    path = write(tmp_path / "m.pt", pickle.dumps(evil, protocol), {})
    with pytest.raises(CheckpointError, match=r"m\.pt: (refuses|opcode)"):
        read_torch_zip(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"\x80\x02ctorch.serialization\nload\n.", "refuses the name 'torch.serialization load'"),
        (b"\x80\x02ctorch\n\\dumps\n.", "refuses the name"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "refuses to call"),
        (b"\x80\x02}U\x01xN.", "opcode SHORT_BINSTRING"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02}", "has no end|not a readable"),
        (b"\x80\x02.", "takes more than it has put"),
        (b"\x80\x02}u.", "closes what it has not opened"),
        (b"\x80\x02h\x05.", "slot 5, which is empty"),
        (b"\x80\x02]q\x00h\x00a.", "expected a dict of tensors, found list"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "stands in several places"),
        (b"\x80\x02}X\x01\x00\x00\x00xb.", "refuses to set attributes"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "not a readable"),
        (b"\x80\x02K\x01Q.", "not one to a storage"),
        (b"\x80\x02" + b")" + b"\x85" * 100_000 + b".", "expected a dict of tensors, found tuple"),
    ],
)
def test_descriptions_that_are_no_state_dict_are_refused(tmp_path, description, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(write(tmp_path / "m.pt", description, {}))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (4, (3,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 3), (4, 1)),
        (5, (3,), (-1,)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (2, 3), (3,)),
        (0, (2.0, 3), (3, 1)),
        (0, 6, 1),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, storage, offset, size, stride):
    path = write(
        tmp_path / "m.pt",
        tree_with(Tensor(storage, offset, size, stride)),
        {"0": storage.array.tobytes()},
    )
    with pytest.raises(CheckpointError, match=r"m\.pt: (a tensor of size|refuses)"):
        read_torch_zip(path)


@pytest.mark.parametrize("key", ["../../etc/passwd", "0/../1", "", "9" * 20])
def test_storage_keys_are_numbers(tmp_path, key):
    tensor = Tensor(Storage(key, np.zeros(1, np.float32)), 0, (1,), (1,))
    with pytest.raises(CheckpointError, match="is not a number"):
        read_torch_zip(write(tmp_path / "m.pt", tree_with(tensor), {}))


def test_storages_must_exist_and_have_the_announced_size(tmp_path, storage):
    description = tree_with(Tensor(storage, 0, (6,), (1,)))
    with pytest.raises(CheckpointError, match="storage 0 is missing"):
        read_torch_zip(write(tmp_path / "m.pt", description, {}))
    with pytest.raises(CheckpointError, match="storage 0 holds 20 bytes, 6 x float32"):
        read_torch_zip(write(tmp_path / "m.pt", description, {"0": bytes(20)}))


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 2), (1, 1)), ((3, 2), (0, 1)), ((2, 3), (2, 1)), ((4,), (0,))]
)
def test_tensors_that_overlap_themselves_are_refused(tmp_path, storage, size, stride):
    description = tree_with(Tensor(storage, 0, size, stride))
    path = write(tmp_path / "m.pt", description, {"0": storage.array.tobytes()})
    with pytest.raises(CheckpointError, match="overlaps itself"):
        read_torch_zip(path)


def test_tensors_share_a_storage_only_side_by_side_or_whole(tmp_path, storage):
    def read(*views):
        tree = {f"t{i}": Tensor(storage, *view) for i, view in enumerate(views)}
        path = write(tmp_path / "m.pt", dumps(tree), {"0": storage.array.tobytes()})
        return read_torch_zip(path)

    columns = read((0, (3, 1), (2, 1)), (1, (3, 1), (2, 1)))
    np.testing.assert_array_equal(np.hstack(list(columns.values())), [[0, 1], [2, 3], [4, 5]])
    tied = read((0, (6,), (1,)), (0, (6,), (1,)))
    np.testing.assert_array_equal(tied["t0"], tied["t1"])
    with pytest.raises(CheckpointError, match="tensors that overlap in their storage of 6"):
        read((0, (4,), (1,)), (2, (4,), (1,)))
    with pytest.raises(CheckpointError, match="tensors that overlap in their storage of 6"):
        read((0, (6,), (1,)), *((i, (1,), (1,)) for i in range(3)))


def rename(path, old: bytes, new: bytes, *, local: bool = True, central: bool = True) -> None:
    """Gives a member another name of the same length, in either of the two places."""
    assert len(old) == len(new)
    data = path.read_bytes()
    places = [data.index(old), data.rindex(old)]
    for place, wanted in zip(places, (local, central), strict=True):
        if wanted:
            data = data[:place] + new + data[place + len(old) :]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", [b"../../../data/0", b"/rchive/data/0/", b"archive//data/0", b"archive\\data\\0",
             b"archive/../da/0", b"C:/hive/data/00"],
)  # fmt: skip
def test_member_names_that_lead_elsewhere_are_refused(tmp_path, name):
    path = save(tmp_path / "m.pt", {"w": np.zeros(3, np.float32)})
    old = b"archive/data/0".ljust(len(name), b"\0")
    if len(name) != len(b"archive/data/0"):
        name = name[: len(b"archive/data/0")]
        old = b"archive/data/0"
    rename(path, old, name)
    with pytest.raises(CheckpointError, match=r"a name that leads elsewhere|not a readable"):
        read_torch_zip(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_member_has_one_name(tmp_path):
    path = save(tmp_path / "m.pt", {"a": np.zeros(3, np.float32), "b": np.ones(3, np.float32)})
    rename(path, b"archive/data/1", b"archive/data/9", local=False)
    with pytest.raises(CheckpointError, match="'archive/data/9' is called b'archive/data/1'"):
        read_torch_zip(path)
    path = save(tmp_path / "n.pt", {"a": np.zeros(3, np.float32), "b": np.ones(3, np.float32)})
    rename(path, b"archive/data/1", b"archive/data/0")
    with pytest.raises(CheckpointError, match="stands there twice"):
        read_torch_zip(path)


def test_nothing_stands_before_the_archive(tmp_path):
    path = save(tmp_path / "m.pt", {"a": np.zeros(3, np.float32)})
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    with pytest.raises(CheckpointError, match="10 bytes stand before the archive"):
        read_torch_zip(path)


def test_huge_descriptions_are_refused(tmp_path):
    description = b"\x80\x02" + b"]" * (4 << 20) + b"."
    with pytest.raises(CheckpointError, match="a description of 4194307 bytes"):
        read_torch_zip(write(tmp_path / "m.pt", description, {}))


def test_values_that_double_at_every_step_are_refused(tmp_path):
    # Each dict holds the one before it twice: 2^64 leaves in a few hundred bytes.
    steps = b"".join(
        b"}q" + bytes([i]) + b"(K\x00h" + bytes([i - 1]) + b"K\x01h" + bytes([i - 1]) + b"u"
        for i in range(1, 65)
    )
    with pytest.raises(CheckpointError, match="stands in several places"):
        read_torch_zip(write(tmp_path / "m.pt", b"\x80\x02}q\x00" + steps + b".", {}))


def test_compressed_members_are_refused(tmp_path):
    path = save(tmp_path / "m.pt", {"w": np.zeros(1 << 20, np.float32)}, compression=8)
    assert path.stat().st_size < 10_000, "a zip bomb in the small"
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torch_zip(path)


def _patch_directory(path, entry: int, field: int, value: int) -> None:
    """Overwrites one 32-bit field of an entry of the zip's central directory."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(entry + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    struct.pack_into("<I", data, at + field, value)
    path.write_bytes(bytes(data))


def test_overlapping_and_overlong_members_are_refused(tmp_path):
    tensors = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    path = save(tmp_path / "a.pt", tensors)
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[2].header_offset
    _patch_directory(path, entry=3, field=42, value=first)
    with pytest.raises(CheckpointError, match=r"overlaps|not a readable"):
        read_torch_zip(path)
    path = save(tmp_path / "b.pt", tensors)
    _patch_directory(path, entry=2, field=20, value=1 << 30)
    _patch_directory(path, entry=2, field=24, value=1 << 30)
    with pytest.raises(CheckpointError, match=r"past the file's end|not a readable"):
        read_torch_zip(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_damaged_files_end_in_one_error(tmp_path, data):
    path = save(tmp_path / "m.pt", {"w": np.arange(12, dtype=np.float32).reshape(3, 4)})
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        assert all(t.nbytes <= len(content) for t in read_torch_zip(path).values())
