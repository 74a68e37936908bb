"""Recorded episodes, one file each, from which `qvla collect` builds RLDS.

Pictures are stored as JPEG, encoded once.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from qvla_jax.atomic import atomic_path
from qvla_jax.data.open_x.columns import Entries
from qvla_jax.errors import DatasetError

CAMERA_KEYS = ("image", "wrist_image")
_COLUMNS = ("state", "joint_state", "label", "executed")
_QUALITY = 95


@dataclass
class Recording:
    """One episode; lists have an entry for each step.

    Attributes:
        task: LIBERO's name of the task.
        instruction: the task in words.
        seed: of the episode.
        success: whether the last action solved the task.
        image: JPEG of the main camera; `wrist_image` likewise of the wrist camera.
        state: f32[8] proprio.
        joint_state: f32[7] in rad.
        label: f32[7], what the expert does in this state, in LIBERO's convention.
        executed: f32[7], what was executed, in the same convention.
    """

    task: str
    instruction: str
    seed: int
    success: bool = False
    image: list[bytes] = field(default_factory=list)
    wrist_image: list[bytes] = field(default_factory=list)
    state: list[np.ndarray] = field(default_factory=list)
    joint_state: list[np.ndarray] = field(default_factory=list)
    label: list[np.ndarray] = field(default_factory=list)
    executed: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def empty(cls, *, task: str, instruction: str, seed: int) -> Self:
        """A recording without steps."""
        return cls(task=task, instruction=instruction, seed=seed)

    def add(self, seen: Mapping[str, Any], *, joints: np.ndarray, label: np.ndarray) -> None:
        """Adds the observation before an action; the action itself goes to `executed`."""
        for key in CAMERA_KEYS:
            getattr(self, key).append(encode_jpeg(seen[key]))
        self.state.append(np.asarray(seen["state"], np.float32))
        self.joint_state.append(np.asarray(joints, np.float32))
        self.label.append(np.asarray(label, np.float32))

    def __len__(self) -> int:
        return len(self.label)


def encode_jpeg(image: np.ndarray, *, quality: int = _QUALITY, full_chroma: bool = True) -> bytes:
    """Encodes u8[height, width, 3]; color at full resolution or half."""
    from PIL import Image

    buffer = io.BytesIO()
    subsampling = 0 if full_chroma else 2
    Image.fromarray(image).save(
        buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True
    )
    return buffer.getvalue()


def save_recording(path: Path, recording: Recording) -> None:
    """Writes a recording atomically."""
    arrays: dict[str, Any] = {
        name: getattr(recording, name) for name in ("task", "instruction", "seed", "success")
    }
    for name in _COLUMNS:
        arrays[name] = np.stack(getattr(recording, name))
    for key in CAMERA_KEYS:
        files = getattr(recording, key)
        arrays[key] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{key}_ends"] = np.cumsum([len(file) for file in files])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_recording(path: Path) -> Recording:
    """Reads a recording.

    Raises:
        DatasetError: the file is missing or damaged, or a value is not finite.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            recording = Recording(
                task=str(arrays["task"]),
                instruction=str(arrays["instruction"]),
                seed=int(arrays["seed"]),
                success=bool(arrays["success"]),
            )
            for name in _COLUMNS:
                getattr(recording, name).extend(arrays[name])
            for key in CAMERA_KEYS:
                data, ends = arrays[key].tobytes(), arrays[f"{key}_ends"].tolist()
                starts = [0, *ends[:-1]]
                getattr(recording, key).extend(
                    data[start:end] for start, end in zip(starts, ends, strict=True)
                )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{path}: damaged recording ({error}); delete it and collect again"
        ) from error
    lengths = {name: len(getattr(recording, name)) for name in (*CAMERA_KEYS, *_COLUMNS)}
    if len(set(lengths.values())) != 1 or not len(recording):
        raise DatasetError(f"{path}: damaged recording, entries differ in length: {lengths}")
    for name in _COLUMNS:
        try:
            Entries(name).of(getattr(recording, name))
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from error
    return recording
