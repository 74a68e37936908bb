"""Files are written completely or not at all."""

import json
import math
import resource
import stat

import pytest

from qvla_jax.atomic import atomic_path, write_bytes, write_json, write_text
from qvla_jax.errors import InputError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the new on")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_the_file_does_not_exist_before_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "result.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.suffix == path.suffix
    assert path.read_bytes() == b"new"


def test_files_get_the_ordinary_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    write_bytes(tmp_path / "atomic", b"")
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("ordinary", "atomic")}
    assert len(modes) == 1


def test_json_round_trip_and_refusal_of_numbers_that_are_not_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}


def test_a_disk_without_room_is_named_and_the_old_file_stays(tmp_path):
    path = tmp_path / "result.bin"
    write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"result\.bin: cannot be written \(File too large\)"):
            write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.bin"]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/x\.json: cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_file_that_is_read_meanwhile_is_not_blamed_on_the_destination(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), atomic_path(tmp_path / "x"):
        (tmp_path / "gone").read_bytes()
