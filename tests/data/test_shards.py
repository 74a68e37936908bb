"""Descriptions that count other episodes or files than there are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qvla_jax import data
from qvla_jax.cli import main
from qvla_jax.errors import DatasetError

from . import small_sets as sets

FORMATS = ("array_record", "tfrecord")
REMEDY = "build the data set again, or count its episodes with tfds.folder_dataset.write_metadata"


def needs(file_format: str) -> None:
    if file_format == "tfrecord":
        pytest.importorskip("tensorflow", reason="TFRecord needs TensorFlow (extra `rlds`)")


def read(folder: Path) -> data.CalibrationSet:
    return data.calibration_set(folder, frames=4)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("lengths", [[], ["0"], [0, 0], ["-1"], ["3", "-3"]])
def test_a_description_that_counts_no_episodes(
    tmp_path: Path, file_format: str, lengths: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    needs(file_format)
    folder = sets.write(tmp_path / "set", file_format=file_format, shard_lengths=lengths)
    message = rf"{folder}: the description counts no episodes in 'train' \(shardLengths in .* is \["
    with pytest.raises(DatasetError, match=message) as caught:
        read(folder)
    assert REMEDY in str(caught.value)
    out = tmp_path / "run"
    assert main(["calibrate", "--dataset", str(folder), "--frames", "4", "--out", str(out)]) == 2
    assert "counts no episodes in 'train'" in " ".join(capsys.readouterr().err.split())
    assert not list(out.glob("*"))


@pytest.mark.parametrize("change", ["null", "absent"])
def test_a_description_without_the_list(tmp_path: Path, change: str) -> None:
    folder = sets.write(tmp_path / "set")
    info = json.loads((folder / "dataset_info.json").read_text())
    if change == "null":
        info["splits"][0]["shardLengths"] = None
    else:
        del info["splits"][0]["shardLengths"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="counts no episodes in 'train'"):
        read(folder)


@pytest.mark.parametrize("lengths", [[2], ["2"], [2.0]])
def test_counts_may_be_numbers_or_text(tmp_path: Path, lengths: list[Any]) -> None:
    folder = sets.write(tmp_path / "set", shard_lengths=lengths)
    assert read(folder).hash == read(sets.write(tmp_path / "again")).hash


@pytest.mark.parametrize("lengths", [["two"], "2", [{}], [1.5], ["99999999999999999999"]])
def test_counts_that_are_none_are_one_error(tmp_path: Path, lengths: Any) -> None:
    folder = sets.write(tmp_path / "set", shard_lengths=lengths)
    with pytest.raises(DatasetError, match=f"^{re.escape(str(folder))}: "):
        read(folder)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(("lengths", "found"), [(["1"], 2), (["3"], 2), (["1000000"], 2)])
def test_a_wrong_count_is_one_error(
    tmp_path: Path, file_format: str, lengths: list[str], found: int
) -> None:
    needs(file_format)
    folder = sets.write(tmp_path / "set", file_format=file_format, shard_lengths=lengths)
    message = f"-00000-of-00001: holds {found} episodes, the description counts {lengths[0]} .*tfds"
    with pytest.raises(DatasetError, match=message):
        data.calibration_set(folder, frames=4, max_episodes=2)


@pytest.mark.parametrize("file_format", FORMATS)
def test_counts_of_the_wrong_files(tmp_path: Path, file_format: str) -> None:
    needs(file_format)
    folder = sets.write(
        tmp_path / "set",
        sets.episodes((2, 2, 2)),
        files=2,
        file_format=file_format,
        shard_lengths=["1", "2"],
    )
    with pytest.raises(DatasetError, match=r"00000-of-00002: holds 2 episodes, .* counts 1 "):
        read(folder)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("lengths", [["3"], ["1", "1", "1"]])
def test_another_number_of_files(tmp_path: Path, file_format: str, lengths: list[str]) -> None:
    needs(file_format)
    folder = sets.write(
        tmp_path / "set",
        sets.episodes((2, 2, 2)),
        files=2,
        file_format=file_format,
        shard_lengths=lengths,
    )
    with pytest.raises(DatasetError, match=r"of-00002.*does not count; .*write_metadata"):
        read(folder)


def test_what_is_left_of_another_build_is_refused(tmp_path: Path) -> None:
    folder = sets.write(tmp_path / "set")
    (path,) = folder.glob("*-00000-of-00001")
    path.with_name(path.name.replace("of-00001", "of-00004")).write_bytes(path.read_bytes())
    with pytest.raises(DatasetError, match=r"-of-00004 lie there, which .* does not count; remove"):
        read(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = sets.write(tmp_path / "set", files=2)
    next(folder.glob("*-00001-of-00002")).unlink()
    message = r"-00001-of-00002: missing; split 'train' needs it\. Copy the data set again"
    with pytest.raises(DatasetError, match=message):
        read(folder)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_cut_file_is_one_error(tmp_path: Path, file_format: str) -> None:
    needs(file_format)
    folder = sets.write(tmp_path / "set", file_format=file_format)
    (path,) = folder.glob("*-of-00001")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DatasetError, match=r"truncated or damaged .*Copy or build"):
        read(folder)
