"""Files of rendered frames, each bound to the states that it was rendered from."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from qvla_jax.atomic import atomic_path
from qvla_jax.data.libero.hdf5 import Demonstration
from qvla_jax.errors import DatasetError


def frames_path(folder: Path, demo: Demonstration) -> Path:
    """File of a demonstration's rendered frames."""
    return folder / f"{demo.key}.npz"


def load_rendered(folder: Path, demo: Demonstration) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads rendered frames (image, wrist_image; u8[t, size, size, 3]); None if there are none.

    Raises:
        DatasetError: the file is damaged, or was rendered from other states.
    """
    path = frames_path(folder, demo)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            image, wrist, digest = arrays["image"], arrays["wrist_image"], str(arrays["digest"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{path}: damaged frames ({error}); delete it and render again"
        ) from error
    for name, frames in (("image", image), ("wrist_image", wrist)):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise DatasetError(
                f"{path}: {name}: expected uint8 [t, H, W, 3], found {frames.dtype} "
                f"{list(frames.shape)}; delete it and render again"
            )
    if digest != states_digest(demo):
        raise DatasetError(
            f"{path}: rendered from other states than {demo.file}:{demo.group}; render it again"
        )
    return image, wrist


def save_rendered(
    folder: Path, demo: Demonstration, image: np.ndarray, wrist_image: np.ndarray
) -> None:
    """Writes rendered frames atomically."""
    with atomic_path(frames_path(folder, demo)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, image=image, wrist_image=wrist_image, digest=states_digest(demo))


def is_rendered(folder: Path, demo: Demonstration) -> bool:
    """Tells whether the frames are there, whole, and of these states."""
    try:
        return load_rendered(folder, demo) is not None
    except DatasetError:
        return False


def states_digest(demo: Demonstration) -> str:
    """Hash of what frames are rendered from."""
    digest = hashlib.sha256(np.ascontiguousarray(demo.states).tobytes())
    for name, pose in sorted(demo.fixtures.items()):
        digest.update(name.encode() + np.ascontiguousarray(pose).tobytes())
    return digest.hexdigest()
