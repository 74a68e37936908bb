"""Small demonstration files in every layout, and a blocker of TensorFlow."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

SIZE = 16
TASKS = ("pick_up_the_bowl_and_place_it", "open_the_drawer")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write_demo(parent: h5py.Group, index: int, *, frames: bool, length: int) -> None:
    """One demonstration in our layout; its content follows from its number alone."""
    rng = np.random.default_rng(index)
    demo = parent.create_group(f"demo_{index}")
    actions = rng.uniform(-1, 1, (length, 7))
    actions[:, 6] = np.sign(actions[:, 6])
    demo["actions"] = actions
    demo["actions_executed"] = actions + (0.1 if index % 2 else 0.0)
    demo["states"] = rng.normal(size=(length, 20))
    demo["proprio"] = rng.normal(size=(length, 8)).astype(np.float32)
    demo.attrs["seed"] = 1000 + index
    demo.attrs["noise_sigma"] = 0.1 * (index % 2)
    demo.attrs["fixture_names"] = json.dumps(["stove_main"])
    demo.attrs["fixture_pose"] = rng.normal(size=(1, 7))
    if frames:
        obs = demo.create_group("obs")
        # Smooth pictures, so that JPEG changes them little.
        ramp = np.linspace(0, 200, SIZE).astype(np.uint8)
        picture = np.broadcast_to(ramp[None, None, :, None], (length, SIZE, SIZE, 3)).copy()
        picture[..., 1] = index
        obs["agentview_rgb"] = picture
        obs["eye_in_hand_rgb"] = picture[:, :, ::-1]
        obs["joint_states"] = rng.normal(size=(length, 7))


@pytest.fixture
def demo_files(tmp_path: Path) -> list[Path]:
    """Two tasks with four demonstrations each, frames included."""
    folder = tmp_path / "demos"
    folder.mkdir()
    paths = []
    for number, task in enumerate(TASKS):
        path = folder / f"{task}_demo.hdf5"
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["task_language"] = task.replace("_", " ")
            data.attrs["bddl_file_name"] = f"{task}.bddl"
            data.attrs["macros_image_convention"] = "rotated180"
            for index in range(4):
                write_demo(data, index + 10 * number, frames=True, length=5 + index)
        paths.append(path)
    return paths


@pytest.fixture
def states_file(tmp_path: Path) -> Path:
    """The demonstrations of `demo_files` and one more of each task, without frames."""
    path = tmp_path / "states.hdf5"
    with h5py.File(path, "w") as file:
        for number, task in enumerate(TASKS):
            group = file.create_group(task)
            group.attrs["bddl_file_name"] = f"{task}.bddl"
            for index in range(5):
                write_demo(group, index + 10 * number, frames=False, length=5 + index)
    return path


@pytest.fixture
def edit_json() -> Any:
    """Rewrites a JSON file through a function of its text."""

    def edit(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit
