"""LeRobot sets: those that lerobot wrote, of which every pixel is known, and others."""

import dataclasses
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from qvla_jax import cli, data
from qvla_jax.data import open_x
from qvla_jax.data.lerobot import rows
from qvla_jax.errors import DatasetError, InputError

from . import lerobot_sets as sets

pytest.importorskip("av", reason="reading videos needs PyAV (extra `lerobot`)")

RECORDED = Path(__file__).parent / "fixtures" / "lerobot.zip"
SPEC = "lerobot/libero"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets that the lerobot package wrote: v30_images, v30_videos and v21_videos."""
    folder = tmp_path_factory.mktemp("recorded")
    with zipfile.ZipFile(RECORDED) as file:
        file.extractall(folder)
    return folder


def drawn_by_hand(episode: int, step: int) -> np.ndarray:
    """The picture that their README describes: a white square on grey."""
    picture = np.full((64, 64, 3), (40 * episode + 3 * step) % 256, np.uint8)
    picture[step : step + 8, 8 * episode : 8 * episode + 8] = 255
    return picture


def decoded_whole(path: Path) -> list[np.ndarray]:
    """All frames of a video, from the first to the last."""
    import av

    with av.open(path) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("name", ["v30_images", "v30_videos", "v21_videos"])
def test_every_pixel_that_lerobot_wrote(recorded: Path, name: str) -> None:
    source = data.open_source(recorded / name, spec=SPEC)
    assert isinstance(source, data.LeRobotDataset)
    assert source.lengths == {e: 6 + e for e in range(5)}
    videos = {
        camera: [
            frame
            for path in sorted((recorded / name).rglob("*.mp4"))
            if camera in path.parts
            for frame in decoded_whole(path)
        ]
        for camera in ("observation.images.image", "observation.images.wrist_image")
    }
    row = 0
    for episode in source.episodes():
        assert episode.instruction == sets.TASKS[episode.id % 2]
        np.testing.assert_array_equal(episode.action[:, 6], np.arange(len(episode)) % 2)
        for step, pictures in enumerate(zip(episode.image, episode.wrist_image, strict=True)):
            right = drawn_by_hand(episode.id, step)
            for found, expected, frames in zip(
                pictures, (right, 255 - right), videos.values(), strict=True
            ):
                if name == "v30_images":
                    np.testing.assert_array_equal(found, expected)
                    continue
                np.testing.assert_array_equal(found, frames[row])
                loss = found.astype(int) - expected
                assert abs(np.median(loss)) <= 2
                assert np.abs(loss).mean() < 3
            row += 1
    assert row == 40


@pytest.mark.parametrize("name", ["v30_videos", "v21_videos"])
def test_the_formats_hold_the_same_numbers(recorded: Path, name: str) -> None:
    images = data.open_source(recorded / "v30_images", spec=SPEC)
    others = data.open_source(recorded / name, spec=SPEC)
    for one, other in zip(
        images.episodes(images=False), others.episodes(images=False), strict=True
    ):
        np.testing.assert_array_equal(one.action, other.action)
        np.testing.assert_array_equal(one.state, other.state)
        assert one.instructions == other.instructions


# Sets that are written here.


def written(folder: Path, made: sets.Parts) -> data.EpisodeSource:
    return data.open_source(sets.write(folder / "set", made), spec=SPEC)


CODECS = {
    "all-intra": {"g": "1"},
    "short": {"g": "2"},
    "long": {"g": "250", "bf": "3"},
    "vp9": {"codec": "libvpx-vp9"},
}


@pytest.mark.parametrize("start", [0.0, 2.5])
@pytest.mark.parametrize("codec", CODECS)
def test_frames_are_found_by_their_time(codec: str, start: float, tmp_path: Path) -> None:
    """Alone, in one pass, and over gaps; the same as a decoder gives that reads the whole file."""
    made = sets.parts((45, 30, 9), videos=True, codec=CODECS[codec], start=start)
    source = written(tmp_path, made)
    whole = decoded_whole(tmp_path / f"set/videos/{sets.IMAGE}/chunk-000/file-000.mp4")
    for episode, first in ((0, 0), (1, 45)):
        (encoded,) = source.encoded_episodes([episode])
        steps = len(encoded.episode)
        together = encoded.pictures["image"].decode_all()
        np.testing.assert_array_equal(together, whole[first : first + steps])
        for chosen in ([steps - 1], [7, 3, 7], [0, steps - 1, 1]):
            found = encoded.only(set(chosen)).pictures["image"].decode(chosen)
            np.testing.assert_array_equal(np.stack(found), together[chosen])
        grey = [sets.grey(episode, step) for step in range(steps)]
        assert np.abs(np.median(together, axis=(1, 2, 3)) - grey).max() <= 1


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("videos", [False, True])
def test_sets_of_each_version_are_read(version: str, videos: bool, tmp_path: Path) -> None:
    made = sets.parts(version=version, videos=videos)
    source = written(tmp_path, made)
    assert (source.name, source.version, source.num_episodes) == (SPEC, version, 3)
    for episode in source.episodes():
        columns = made.columns[episode.id]
        np.testing.assert_array_equal(episode.state, np.float32(columns[sets.STATE]))
        np.testing.assert_array_equal(
            episode.action[:, :6], np.float32(columns[sets.ACTION])[:, :6]
        )
        # 1 closes and -1 opens; the standard is 1 for open.
        np.testing.assert_array_equal(episode.action[:, 6], np.arange(len(episode)) % 2)
        expected = np.stack([sets.picture(episode.id, t) for t in range(len(episode))])
        np.testing.assert_allclose(episode.image, expected, atol=videos)
        np.testing.assert_allclose(episode.wrist_image, 255 - expected, atol=videos)
        assert episode.metadata["tasks"] == [episode.instruction]


def test_shares_and_seeds_are_those_of_every_source(tmp_path: Path) -> None:
    path = sets.write(tmp_path / "set", sets.parts((2, 3, 2, 3, 2)))
    shares = [data.open_source(path, spec=SPEC, process_index=i, process_count=2) for i in range(2)]
    assert [list(share.episode_ids) for share in shares] == [[0, 2, 4], [1, 3]]
    order = [e.id for e in data.open_source(path, spec=SPEC).episodes(images=False, seed=1)]
    assert sorted(order) == [*range(5)] != order
    frames = [*data.open_source(path, spec=SPEC).frames(horizon=2, seed=0)]
    assert len({(frame.episode, frame.step) for frame in frames}) == 12
    with pytest.raises(DatasetError, match=r"run from 0 to 4, got 5 to 5"):
        next(shares[0].episodes([5]))


def test_a_split_is_a_range_of_episodes(tmp_path: Path) -> None:
    made = sets.parts(info={"splits": {"train": "0:2", "heldout": "2:3"}})
    path = sets.write(tmp_path / "set", made)
    heldout = data.open_source(path, "heldout", spec=SPEC)
    assert heldout.lengths == {0: 4}
    (episode,) = heldout.episodes()
    np.testing.assert_array_equal(episode.state, np.float32(made.columns[2][sets.STATE]))
    assert data.open_source(path, spec=SPEC).split == "train"
    with pytest.raises(DatasetError, match="no split 'test'; it has train, heldout"):
        data.open_source(path, "test", spec=SPEC)


def test_frames_of_an_episode_may_have_several_tasks(tmp_path: Path) -> None:
    made = sets.parts()
    made.columns[1]["task_index"] = [1, 1, 0, 0, 0]
    source = written(tmp_path, made)
    (episode,) = source.episodes([1])
    assert episode.instructions == (*[sets.TASKS[1]] * 2, *[sets.TASKS[0]] * 3)
    (outline,) = source.outlines([1], gripper=False)
    assert (outline.instruction, outline.length) == (sets.TASKS[1], 5)


def test_the_table_of_tasks_may_have_an_index_without_a_name(tmp_path: Path) -> None:
    """As pandas writes it."""
    path = sets.write(tmp_path / "set", sets.parts())
    table = pq.read_table(path / "meta" / "tasks.parquet")
    table = table.rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(table, path / "meta" / "tasks.parquet")
    (episode,) = data.open_source(path, spec=SPEC).episodes([1], images=False)
    assert episode.instruction == sets.TASKS[1]


# What is read.


def test_lengths_and_instructions_need_no_row(tmp_path: Path) -> None:
    source = written(tmp_path, sets.parts())
    shutil.rmtree(tmp_path / "set" / "data")
    assert source.lengths == {0: 3, 1: 5, 2: 4}
    outlines = [*source.outlines(source.episode_ids, gripper=False)]
    assert [outline.instruction for outline in outlines] == [sets.TASKS[i] for i in (0, 1, 0)]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_draw_reads_the_files_of_its_episodes_alone(version: str, tmp_path: Path) -> None:
    made = sets.parts((4,) * 8, version=version, videos=True, per_file=1)
    path = sets.write(tmp_path / "set", made)
    drawn = data.calibration_set(path, frames=3, spec=SPEC, max_episodes=2)
    needed = {path / name for name in drawn.manifest["sources"][0]["files"]}
    assert len(drawn.manifest["sources"][0]["files"]) <= 4 + 2 * 3
    for file in path.rglob("*.*"):
        if file.is_file() and file not in needed:
            file.unlink()
    again = data.calibration_set(path, frames=3, spec=SPEC, max_episodes=2)
    assert again.hash == drawn.hash
    _same_batches(again, drawn)


def test_pictures_are_not_read_where_nobody_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = rows.RowFiles.read

    def noted(self: rows.RowFiles, file: str, part: range, columns: list[str], **more: Any) -> Any:
        asked.extend(columns)
        return read(self, file, part, columns, **more)

    monkeypatch.setattr(rows.RowFiles, "read", noted)
    source = written(tmp_path, sets.parts())
    assert len([*source.episodes(images=False)]) == 3
    data.dataset_statistics(tmp_path / "set", spec=SPEC, cache=False)
    assert sets.ACTION in asked
    assert sets.IMAGE not in asked
    next(source.episodes())
    assert sets.IMAGE in asked


# Calibration, statistics, the command line.


def _same_batches(one: data.CalibrationSet, other: data.CalibrationSet) -> None:
    for left, right in zip(one.batches(4), other.batches(4), strict=True):
        for key, value in left.items():
            # Pictures are a list where sets differ in size.
            for a, b in zip(value, right[key], strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("videos", [False, True])
def test_a_manifest_brings_back_exactly_the_same_set(videos: bool, tmp_path: Path) -> None:
    path = sets.write(tmp_path / "set", sets.parts(videos=videos))
    options: dict[str, Any] = {"frames": 8, "spec": SPEC, "gripper_share": 0.75}
    drawn = data.calibration_set(path, seed=3, **options)
    drawn.save(tmp_path / "calibration.json")
    rebuilt = data.CalibrationSet.from_manifest(tmp_path / "calibration.json")
    assert rebuilt.manifest == drawn.manifest
    _same_batches(rebuilt, drawn)
    batch = next(drawn.batches(8))
    for row, (episode, step) in enumerate(zip(batch["episode"], batch["step"], strict=True)):
        expected = sets.picture(int(episode), int(step))
        np.testing.assert_allclose(batch["image"][row], expected, atol=videos)
    assert data.calibration_set(path, frames=8, seed=4, spec=SPEC).hash != drawn.hash
    shutil.copytree(path, tmp_path / "moved")
    moved = data.calibration_set(
        tmp_path / "moved", frames=8, seed=3, spec=SPEC, gripper_share=0.75
    )
    assert moved.hash == drawn.hash
    (path / "meta" / "tasks.parquet").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"not those it was drawn from .*meta/tasks.parquet"):
        data.CalibrationSet.from_manifest(drawn.manifest)


def test_statistics_are_kept_until_the_data_change(tmp_path: Path) -> None:
    made = sets.parts()
    path = sets.write(tmp_path / "set", made)
    computed = data.dataset_statistics(path, spec=SPEC)
    every = np.concatenate([np.float32(columns[sets.STATE]) for columns in made.columns])
    assert computed.proprio is not None
    np.testing.assert_allclose(computed.proprio.mean, every.mean(axis=0), atol=1e-6)
    assert computed.num_transitions == 12
    assert (path / "dataset_statistics_train_lerobot_libero.json").is_file()
    assert data.dataset_statistics(path, spec=SPEC).to_json() == computed.to_json()
    shutil.rmtree(path / "data")
    made.columns[0][sets.STATE][0][0] += 50
    sets.write(tmp_path / "other", made)
    shutil.copytree(tmp_path / "other" / "data", path / "data")
    changed = data.dataset_statistics(path, spec=SPEC)
    assert changed.proprio is not None
    assert changed.proprio.max[0] > computed.proprio.max[0] + 40


def test_a_mixture_holds_sets_of_both_formats(tmp_path: Path) -> None:
    path = sets.write(tmp_path / "lerobot" / "libero", sets.parts())
    drawn = data.calibration_set({str(path): 1.0, str(data.bundled_path()): 1.0}, frames=8)
    assert [source["dataset"] for source in drawn.manifest["sources"]] == [SPEC, "libero_spatial"]
    assert drawn.manifest["datasets"].count(0) == 4
    _same_batches(drawn, data.CalibrationSet.from_manifest(drawn.manifest))


def test_the_command_line_takes_a_directory_and_a_spec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sets.write(tmp_path / "set", sets.parts((12, 10), videos=True))
    command = ["calibrate", "--dataset", str(path), "--frames", "6", "--out", str(tmp_path)]
    assert cli.main(command) == cli.BAD_INPUT
    assert "--spec, such as lerobot/libero" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*command, "--spec", SPEC]) == cli.DONE
    rebuilt = data.CalibrationSet.from_manifest(tmp_path / "calibration.json")
    assert rebuilt.frames == 6


# What is refused.

Change = Callable[[sets.Parts], None]


def column(episode: int, name: str, step: int, value: Any) -> Change:
    def change(made: sets.Parts) -> None:
        made.columns[episode][name][step] = value

    return change


def row(episode: int, **entries: Any) -> Change:
    return lambda made: made.episodes.setdefault(episode, {}).update(entries)


def entry(name: str, value: Any) -> Change:
    return lambda made: made.info.update({name: value})


def without(name: str) -> Change:
    def change(made: sets.Parts) -> None:
        for columns in made.columns:
            del columns[name]

    return change


WHERE = r"set: episode 1 of 'train': "
REFUSED: dict[str, tuple[Change, str]] = {
    "number": (
        column(1, sets.STATE, 2, [np.nan] * 8),
        WHERE + "step 2: observation.state: entry 0 is nan, which is not finite",
    ),
    "missing number": (column(1, sets.ACTION, 2, None), WHERE + "step 2: action: the value is mis"),
    "picture": (
        column(1, sets.IMAGE, 2, {"bytes": b"\x89PNG", "path": ""}),
        WHERE + "step 2: observation.images.image: the picture does not decode",
    ),
    "no picture": (
        column(1, sets.WRIST, 4, {"bytes": None, "path": "images/x.png"}),
        WHERE + "step 4: observation.images.image2: the picture is missing",
    ),
    "unknown task": (
        column(1, "task_index", 3, 7),
        WHERE + r"step 3: task_index is 7, which meta/tasks\.\w+ does not have",
    ),
    "another task": (row(1, tasks=[sets.TASKS[0]]), WHERE + "step 0: task_index is 1, 'put the bo"),
    "blank task": (
        lambda made: setattr(made, "tasks", ("open the drawer", "\x07")),
        WHERE + "step 0: task: the instruction .* holds control characters",
    ),
    "another episode": (
        column(1, "episode_index", 0, 2),
        WHERE + "step 0: episode_index is 2 in row .* expected 1",
    ),
    "a step twice": (column(1, "frame_index", 3, 2), WHERE + "step 3: frame_index is 2 in row"),
    "column": (without(sets.ACTION), "lacks the columns action; it has"),
    "length": (
        row(1, length=4),
        "holds 11 frames, info.json counts 12|episode 1 has 4 steps .length., and 5 rows",
    ),
    "episodes": (entry("total_episodes", 4), "holds 3 episodes, info.json counts 4"),
    "tasks": (entry("total_tasks", 3), "holds 2 tasks, meta/info.json counts 3"),
    "an episode twice": (row(1, episode_index=0), "expected an episode 1, found 0"),
    "gripper": (
        column(1, sets.ACTION, 2, [0.0] * 6 + [float("inf")]),
        WHERE + "step 2: action: entry 6 is inf",
    ),
}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(name: str, version: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    made = sets.parts(version=version)
    if name == "missing number":  # an array of lists can lack one, a list of numbers cannot
        made.columns[1][sets.ACTION] = [*made.columns[1][sets.ACTION]]
    change(made)
    with pytest.raises(DatasetError, match=message) as caught:
        [*written(tmp_path, made).episodes()]
    assert "\n" not in str(caught.value)


TIMES: dict[str, tuple[Change, str]] = {
    "beyond the episode": (column(1, "timestamp", 4, 0.5), "step 4: timestamp is 0.5 s; expected"),
    "twice": (column(1, "timestamp", 2, 0.1), "step 2: timestamp is 0.1 s; expected times that"),
    "not finite": (column(1, "timestamp", 2, np.nan), "step 2: timestamp is nan s"),
    "between frames": (
        column(1, "timestamp", 2, 0.25),
        r"step 2: observation.images.image2?: .*has no frame within 0.0001 s of 0\.5500 s",
    ),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_have_to_fit_the_video(name: str, tmp_path: Path) -> None:
    change, message = TIMES[name]
    made = sets.parts(videos=True)
    change(made)
    with pytest.raises(DatasetError, match=message):
        [*written(tmp_path, made).episodes()]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("damage", ["short", "cut", "missing", "no video", "size"])
def test_a_video_has_to_hold_its_episodes(damage: str, version: str, tmp_path: Path) -> None:
    path = sets.write(tmp_path / "set", sets.parts(version=version, videos=True))
    video = sorted(path.rglob("*.mp4"))[-1]  # the wrist camera of episode 2
    if damage == "short":
        sets.encode(video, [sets.picture(0, t) for t in range(2)], fps=10)
    elif damage == "cut":
        video.write_bytes(video.read_bytes()[:300])
    elif damage == "no video":
        video.write_text("This is text.")
    elif damage == "size":
        sets.encode(video, [np.zeros((8, 8, 3), np.uint8)] * 4, fps=10)
    else:
        video.unlink()
    message = {
        "short": r"no frame .*too short",
        "cut": "cannot be decoded; it is truncated or damaged",
        "missing": "missing; copy the data set again",
        "no video": "cannot be decoded; it is truncated or damaged",
        "size": "a picture of 8 x 8 pixels, but the data set declares 16 x 24",
    }[damage]
    source = data.open_source(path, spec=SPEC)
    assert len([*source.episodes([0, 1])]) == 2
    step = 2 if damage == "short" else 0
    where = rf"episode 2 of 'train': step {step}: observation.images.image2: .*{message}"
    with pytest.raises(DatasetError, match=where):
        [*source.episodes([2])]


DECLARED: dict[str, tuple[Change, str]] = {
    "version": (
        entry("codebase_version", "v1.6"),
        "codebase_version 'v1.6' is not read, only v2.0, v2.1, v3.0; convert",
    ),
    "unknown entry": (entry("split_unit", "frame"), "'split_unit' is not known, and may change"),
    "no entry": (entry("fps", None), "fps: expected float"),
    "split": (entry("splits", {"train": "0:50%"}), "split 'train' is '0:50%'; expected first:end"),
    "split beyond": (entry("splits", {"train": "0:9"}), "split 'train' is '0:9'; expected"),
    "template": (
        entry("data_path", "data/{episode}.parquet"),
        r"data_path 'data/\{episode\}.parquet': expected a path inside the data set",
    ),
    "outside": (
        entry("data_path", "../{chunk_index}-{file_index}"),
        "expected a path inside the data set",
    ),
    "no video path": (
        lambda made: (made.info.update(video_path=None), setattr(made, "videos", True)),
        "there is no video_path, though there are features of videos",
    ),
    "depth": (
        lambda made: made.features.update(
            {sets.IMAGE: {"dtype": "image", "shape": [16, 24, 3], "info": {"is_depth_map": True}}}
        ),
        "observation.images.image: it holds depths, not pictures",
    ),
    "shape": (
        lambda made: made.features.update({sets.STATE: {"dtype": "float32", "shape": "8"}}),
        "feature 'observation.state': expected a dtype and a shape",
    ),
    "dtype": (
        lambda made: made.features.update({sets.STATE: {"dtype": "float", "shape": [8], "x": 1}}),
        "observation.state: 'x' is not known, and may change what is meant",
    ),
    "unknown dtype": (
        lambda made: made.features.update({sets.STATE: {"dtype": "sound", "shape": [8]}}),
        "observation.state: unknown dtype 'sound'; there are: image, video, string",
    ),
    "no feature": (
        lambda made: made.features.update({sets.WRIST: None}),
        "steps lack observation.images.image2, which spec 'lerobot/libero' takes",
    ),
    "no times": (
        lambda made: (made.features.update(timestamp=None), setattr(made, "videos", True)),
        "steps lack timestamp, which every set has",
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_declared_is_followed_or_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = DECLARED[name]
    made = sets.parts()
    change(made)
    with pytest.raises(DatasetError, match=message):
        written(tmp_path, made)


def test_features_that_nobody_takes_may_be_anything(tmp_path: Path) -> None:
    made = sets.parts(
        info={"robot_type": None, "total_videos": 99, "tools": [], "data_files_size_in_mb": 1},
        features={
            "observation.depth": {"dtype": "uint16", "shape": [480, 640], "info": {"unit": "mm"}},
            "sound": {"dtype": "audio", "shape": [1], "rate": 16000},
            "language_events": {"dtype": "language", "shape": [1]},
            "observation.state": {"dtype": "float32", "shape": [8], "fps": 10, "original_key": "s"},
        },
    )
    assert len([*written(tmp_path, made).episodes()]) == 3


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, 16, 24], ["channels", "height", "width"]),
        ([3, 16, 24], ["height", "width", "channels"]),  # as some writers have it
        ([16, 24, 3], None),
    ],
)
def test_channels_may_be_declared_first(
    shape: list[int], names: list[str] | None, tmp_path: Path
) -> None:
    camera = {"dtype": "image", "shape": shape, "names": names}
    made = sets.parts(features={sets.IMAGE: camera})
    (episode,) = written(tmp_path, made).episodes([0])
    assert episode.image is not None
    assert episode.image.shape == (3, 16, 24, 3)


# Specifications of public sets.


def renamed(made: sets.Parts, names: dict[str, str]) -> sets.Parts:
    columns = [{names.get(n, n): v for n, v in c.items()} for c in made.columns]
    return dataclasses.replace(made, columns=columns)


@pytest.mark.parametrize(
    "names",
    [
        {sets.WRIST: "observation.images.wrist_image"},
        {sets.IMAGE: "image", sets.WRIST: "wrist_image", sets.STATE: "state", "action": "actions"},
    ],
)
def test_copies_of_libero_name_their_features_differently(
    names: dict[str, str], tmp_path: Path
) -> None:
    made = sets.parts()
    path = sets.write(tmp_path / "set", renamed(made, names))
    info = json.loads((path / "meta" / "info.json").read_text())
    info["features"] = {names.get(n, n): f for n, f in info["features"].items()}
    (path / "meta" / "info.json").write_text(json.dumps(info))
    source = data.open_source(path, spec=SPEC)
    assert source.spec.wrist_image == names[sets.WRIST]
    (episode,) = source.episodes([1])
    np.testing.assert_array_equal(episode.wrist_image[0], 255 - sets.picture(1, 0))
    np.testing.assert_array_equal(episode.state, np.float32(made.columns[1][sets.STATE]))
    assert open_x.DatasetSpec.from_json(source.spec.to_json(), "x") == source.spec
    assert open_x.DatasetSpec.from_json(open_x.get(SPEC).to_json(), "x") == open_x.get(SPEC)


@pytest.mark.parametrize(
    "place",
    ["lerobot/libero", "hub/datasets--lerobot--libero/snapshots/0123abc", "HuggingFaceVLA/libero"],
)
def test_the_specification_is_found_by_the_place(place: str, tmp_path: Path) -> None:
    path = sets.write(tmp_path / place, sets.parts())
    assert data.open_source(path).spec.name == SPEC


@pytest.mark.parametrize("spec", sets.JOINTS)
def test_actions_of_joints_are_taken_as_stored(spec: str, tmp_path: Path) -> None:
    cameras, numbers = sets.JOINTS[spec]
    made = sets.joint_parts(spec)
    path = sets.write(tmp_path / spec, made)
    source = data.open_source(path) if "/" in spec else data.open_source(path, spec=spec)
    assert open_x.DatasetSpec.from_json(source.spec.to_json(), "x") == source.spec
    (_, episode) = source.episodes()
    stored = made.columns[1]

    def joined(prefix: str) -> np.ndarray:
        names = [name for name in numbers if name.startswith(prefix)]
        return np.column_stack([np.float32(stored[name]) for name in names])

    np.testing.assert_array_equal(episode.action, joined("action"))
    np.testing.assert_array_equal(episode.state, joined("observation.state"))
    assert list(episode.cameras()) == list(cameras)
    frames = data.calibration_set(path, frames=3, horizon=2, spec=spec)
    (batch,) = frames.batches(3)
    assert batch["actions"].shape == (3, 2, joined("action").shape[1])
    for camera in cameras:
        expected = [sets.picture(*p) for p in zip(batch["episode"], batch["step"], strict=True)]
        expected = expected if camera == "image" else [255 - one for one in expected]
        np.testing.assert_array_equal(batch[camera], expected)
    again = data.CalibrationSet.from_manifest(frames.manifest)
    np.testing.assert_array_equal(next(again.batches(3))["state"], batch["state"])
    # All are normalized: no entry is a gripper with a range of its own.
    assert data.dataset_statistics(path, spec=spec).action.mask is None


def test_what_actions_of_joints_do_not_allow(tmp_path: Path) -> None:
    spec = "lerobot/aloha_mobile_shrimp"
    path = sets.write(tmp_path / spec, sets.joint_parts(spec))
    with pytest.raises(InputError, match=r"gripper_share: actions of spec .* are those of joints"):
        data.calibration_set(path, frames=2, gripper_share=0.5)
    other = sets.write(tmp_path / "lerobot" / "libero", sets.parts())
    message = r"differ in length \(lerobot/aloha_static_battery 14, lerobot/libero 7\)"
    with pytest.raises(DatasetError, match=message):
        data.calibration_set({str(path): 1.0, str(other): 1.0}, frames=4)


@pytest.mark.parametrize(
    ("spec", "cameras", "numbers", "gripper"),
    [
        (
            "lerobot/droid_1.0.1",
            ("observation.images.exterior_1_left", "observation.images.wrist_left"),
            {
                "action.cartesian_velocity": 6,
                "action.gripper_position": 1,
                "observation.state.cartesian_position": 6,
                "observation.state.gripper_position": 1,
            },
            lambda c: 1 - np.float32(c["action.gripper_position"]),
        ),
        (
            "IPEC-COMMUNITY/bridge_orig_lerobot",
            ("observation.images.image_0", None),
            {"action": 7, "observation.state": 8},
            lambda c: np.float32(c["action"])[:, 6],
        ),
    ],
)
def test_other_public_sets(
    spec: str,
    cameras: tuple[str, str | None],
    numbers: dict[str, int],
    gripper: Callable[[sets.Columns], np.ndarray],
    tmp_path: Path,
) -> None:
    made = sets.parts((4, 3))
    rng = np.random.default_rng(1)
    for columns in made.columns:
        pictures = [columns.pop(sets.IMAGE), columns.pop(sets.WRIST)]
        columns |= {camera: p for camera, p in zip(cameras, pictures, strict=True) if camera}
        del columns[sets.STATE], columns[sets.ACTION]
        for name, size in numbers.items():
            values = rng.uniform(0, 1, (len(columns["frame_index"]), size)).astype(np.float32)
            columns[name] = (values[:, 0] if size == 1 else values).tolist()
    made.features |= dict.fromkeys((sets.IMAGE, sets.WRIST, sets.STATE, sets.ACTION))
    made.features |= {n: {"dtype": "float32", "shape": [size]} for n, size in numbers.items()}
    made.features |= {c: {"dtype": "image", "shape": [16, 24, 3]} for c in cameras if c}
    source = data.open_source(sets.write(tmp_path / "set", made), spec=spec)
    (_, episode) = source.episodes()
    columns = made.columns[1]
    first = next(name for name in numbers if name.startswith("action"))
    np.testing.assert_array_equal(episode.action[:, :6], np.float32(columns[first])[:, :6])
    np.testing.assert_allclose(episode.action[:, 6], gripper(columns), atol=1e-6)
    assert episode.state is not None
    assert episode.state.shape == (3, 8 if "bridge" in spec else 7)
    assert (episode.wrist_image is None) == (cameras[1] is None)


def test_rlds_and_lerobot_are_told_apart(tmp_path: Path) -> None:
    path = sets.write(tmp_path / "set", sets.parts())
    with pytest.raises(DatasetError, match="expected an RLDS data set, found a LeRobot one"):
        data.RldsDataset(path)
    with pytest.raises(DatasetError, match="expected a LeRobot data set, found an RLDS one"):
        data.LeRobotDataset(data.bundled_path())
    assert isinstance(data.open_source(data.bundled_path()), data.RldsDataset)
    assert data.open_source(tmp_path, spec=SPEC).path == path
    message = re.escape(f"{tmp_path / 'none'}: no such directory; expected an RLDS or LeRobot")
    with pytest.raises(DatasetError, match=message):
        data.open_source(tmp_path / "none")
