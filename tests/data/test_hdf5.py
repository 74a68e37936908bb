"""Reading demonstrations in their three layouts."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from qvla_jax.data.libero.frames import frames_path, is_rendered, load_rendered, save_rendered
from qvla_jax.data.libero.hdf5 import has_frames, read_demonstrations, read_frames
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
