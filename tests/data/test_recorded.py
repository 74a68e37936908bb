"""Files of recorded episodes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvla_jax.data.libero.recorded import Recording, load_recording, save_recording
from qvla_jax.errors import DatasetError


def recorded(steps: int = 5) -> tuple[Recording, np.ndarray]:
    rng = np.random.default_rng(0)
    recording = Recording.empty(task="open_it", instruction="open it", seed=2**31 - 1)
    pictures = np.empty((steps, 16, 16, 3), np.uint8)
    for step in range(steps):
        pictures[step] = 20 * step + 50
        seen = {
            "image": pictures[step],
            "wrist_image": pictures[step] // 2,
            "state": rng.normal(size=8),
        }
        recording.add(seen, joints=rng.normal(size=7), label=rng.uniform(-1, 1, 7))
        recording.executed.append(recording.label[-1] + np.float32(0.5))
    recording.success = True
    return recording, pictures


def test_round_trip(tmp_path: Path) -> None:
    recording, pictures = recorded()
    path = tmp_path / "deep" / "one.npz"
    save_recording(path, recording)
    again = load_recording(path)
    assert (again.task, again.instruction) == ("open_it", "open it")
    assert (again.seed, again.success, len(again)) == (2**31 - 1, True, 5)
    assert again.image == recording.image
    assert again.wrist_image == recording.wrist_image
    for name in ("state", "joint_state", "label", "executed"):
        np.testing.assert_array_equal(getattr(again, name), getattr(recording, name))
        assert getattr(again, name)[0].dtype == np.float32
    decoded = [np.asarray(Image.open(io.BytesIO(file))) for file in again.image]
    error = np.stack(decoded).astype(int) - pictures
    assert np.abs(error).max() <= 1  # Flat pictures survive JPEG.


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    recording, _ = recorded()
    path = tmp_path / "one.npz"
    save_recording(path, recording)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"one.npz: damaged recording"):
        load_recording(path)
    recording.executed.pop()
    save_recording(path, recording)
    with pytest.raises(DatasetError, match="differ in length"):
        load_recording(path)
    with pytest.raises(DatasetError, match=r"gone.npz"):
        load_recording(tmp_path / "gone.npz")
