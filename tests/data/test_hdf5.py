"""Reading demonstrations in their three layouts."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from qvla_jax.data.libero.frames import frames_path, is_rendered, load_rendered, save_rendered
from qvla_jax.data.libero.hdf5 import has_frames, read_demonstrations, read_frames
from qvla_jax.data.libero.recorded import encode_jpeg
from qvla_jax.errors import DatasetError


def test_our_layout_keeps_labels_apart_from_what_was_executed(demo_files: list[Path]) -> None:
    demos = list(read_demonstrations(demo_files[0]))
    assert [demo.seed for demo in demos] == [1000, 1001, 1002, 1003]
    assert demos[0].instruction == "pick up the bowl and place it"
    assert np.array_equal(demos[0].actions, demos[0].actions_executed)
    assert not np.array_equal(demos[1].actions, demos[1].actions_executed)
    assert demos[0].rewards.tolist() == [0, 0, 0, 0, 1]
    assert demos[0].fixtures["stove_main"].shape == (7,)
    assert len({demo.key for demo in demos}) == 4


def test_states_only_layout_has_no_frames_and_takes_joints_from_the_state(
    states_file: Path,
) -> None:
    demos = list(read_demonstrations(states_file))
    assert len(demos) == 10
    assert not has_frames(demos[0])
    assert read_frames(demos[0]) is None
    assert np.array_equal(demos[0].joint_state, demos[0].states[:, 1:8].astype(np.float32))


def test_same_start_has_the_same_key_in_both_files(
    demo_files: list[Path], states_file: Path
) -> None:
    with_frames = {demo.key for path in demo_files for demo in read_demonstrations(path)}
    assert with_frames < {demo.key for demo in read_demonstrations(states_file)}


def test_libero_layout_is_turned_upright_and_proprio_put_together(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    image = rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    ee, fingers = rng.normal(size=(3, 6)), rng.normal(size=(3, 2))
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["states"] = np.zeros((3, 7)), np.zeros((3, 20))
        demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = image, image
        demo["obs/ee_states"], demo["obs/gripper_states"] = ee, fingers
        demo["obs/joint_states"] = np.zeros((3, 7))
    (read,) = read_demonstrations(path)
    assert read.instruction == "turn on the stove"
    assert read.seed is None
    np.testing.assert_array_equal(read.proprio, np.c_[ee, fingers].astype(np.float32))
    frames = read_frames(read)
    assert frames is not None
    np.testing.assert_array_equal(frames[0], np.rot90(image, 2, axes=(1, 2)))


def test_rendered_frames_are_bound_to_their_states(states_file: Path, tmp_path: Path) -> None:
    first, second, *_ = read_demonstrations(states_file)
    picture = np.zeros((len(first), 4, 4, 3), np.uint8)
    save_rendered(tmp_path, first, picture, picture)
    assert is_rendered(tmp_path, first)
    assert load_rendered(tmp_path, second) is None
    frames_path(tmp_path, first).rename(frames_path(tmp_path, second))
    with pytest.raises(DatasetError, match="other states"):
        load_rendered(tmp_path, second)
    frames_path(tmp_path, second).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DatasetError, match="damaged"):
        load_rendered(tmp_path, second)
    assert not is_rendered(tmp_path, second)


def damaged(demo_files: list[Path], name: str, value: object) -> Path:
    """The first file, with another array in place of one of its second demonstration."""
    with h5py.File(demo_files[0], "r+") as file:
        del file[f"data/demo_1/{name}"]
        file[f"data/demo_1/{name}"] = value
    return demo_files[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "width"),
    [("actions", 7), ("actions_executed", 7), ("states", 20), ("proprio", 8),
     ("obs/joint_states", 7)],
)  # fmt: skip
def test_values_that_are_not_finite_are_named(
    demo_files: list[Path], name: str, width: int, value: float
) -> None:
    array = np.zeros((6, width))
    array[4, 3] = value
    path = damaged(demo_files, name, array)
    message = f"{path}:/data/demo_1: step 4: {name}: entry 3 is {value}, which is not finite"
    with pytest.raises(DatasetError, match=message):
        list(read_demonstrations(path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("actions", np.full((6, 7), b"0.5"), "actions: expected a vector of numbers"),
        ("actions", np.zeros((6, 14)), "actions: expected 7 entries in each step, found 14"),
        ("actions", np.zeros(6), r"actions: expected \[t, n\] numbers"),
        ("proprio", np.zeros((6, 9)), "proprio: expected 8 entries"),
        ("proprio", np.zeros((5, 8)), r"arrays disagree in length, or are empty: \[5, 6\]"),
        ("states", 3.0, r"states: expected \[t, n\] numbers"),
    ],
)
def test_arrays_of_another_kind_are_named(
    demo_files: list[Path], name: str, value: object, message: str
) -> None:
    path = damaged(demo_files, name, value)
    with pytest.raises(DatasetError, match=f"{path}:/data/demo_1: {message}"):
        list(read_demonstrations(path))


def test_pictures_of_another_kind_are_named(demo_files: list[Path]) -> None:
    path = damaged(demo_files, "obs/agentview_rgb", np.zeros((6, 4, 4, 3), np.float32))
    _, second, *_ = read_demonstrations(path)
    message = r"demo_1: obs/agentview_rgb: expected pictures uint8 \[t, H, W, 3\], found float32"
    with pytest.raises(DatasetError, match=message):
        read_frames(second)
    with h5py.File(path, "r+") as file:
        obs = file["data/demo_1/obs"]
        del obs["agentview_rgb"], obs["eye_in_hand_rgb"]
        obs["agentview_rgb"] = np.zeros((6, 4, 4, 3), np.uint8)
        files = obs.create_dataset("eye_in_hand_jpeg", (6,), h5py.vlen_dtype(np.uint8))
        for step in range(6):
            files[step] = np.frombuffer(encode_jpeg(np.zeros((4, 4, 3), np.uint8)), np.uint8)
        files[3] = files[3][:-30]
    with pytest.raises(DatasetError, match=r"demo_1: step 3: obs/eye_in_hand_jpeg: .* not decode"):
        read_frames(second)


def test_instructions_stored_as_bytes_are_text(demo_files: list[Path]) -> None:
    with h5py.File(demo_files[0], "r+") as file:
        file["data"].attrs["task_language"] = np.bytes_(b"Open the caf\xc3\xa9")
    assert next(read_demonstrations(demo_files[0])).instruction == "open the café"
    with h5py.File(demo_files[0], "r+") as file:
        file["data"].attrs["task_language"] = [1.0, 2.0]
    with pytest.raises(DatasetError, match="demo_0: task_language: expected an instruction"):
        list(read_demonstrations(demo_files[0]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such"):
        list(read_demonstrations(tmp_path / "absent.hdf5"))
    broken = tmp_path / "broken.hdf5"
    broken.write_bytes(b"not hdf5")
    with pytest.raises(DatasetError, match=r"broken\.hdf5"):
        list(read_demonstrations(broken))
    empty = tmp_path / "empty.hdf5"
    with h5py.File(empty, "w") as file:
        file.create_group("data")
    with pytest.raises(DatasetError, match="no demo_"):
        list(read_demonstrations(empty))
    partial = tmp_path / "partial.hdf5"
    with h5py.File(partial, "w") as file:
        file["data/demo_0/actions"] = np.zeros((2, 7))
    with pytest.raises(DatasetError, match="missing states; has actions"):
        list(read_demonstrations(partial))


def test_command_ends_with_code_2_on_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvla_jax.data.libero.render"]
    arguments = ["--states", str(tmp_path / "absent.hdf5"), "--out", str(tmp_path / "frames")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "absent.hdf5: no such demonstration file" in done.stderr
    assert not (tmp_path / "frames").exists()
