"""Demonstrations of LIBERO tasks in HDF5 files: one reader for the three layouts that exist.

* LIBERO's own: one file for each task, `data/demo_k` with `obs/agentview_rgb` and
  `obs/eye_in_hand_rgb` as the simulator gave them (upside down), no proprio array.
* Ours with frames: the same, with `proprio`, the clean expert label in `actions` and what was
  run in `actions_executed`; images already rotated (`macros_image_convention`), the wrist
  camera perhaps as JPEG in `obs/eye_in_hand_jpeg`.
* Ours without frames: one file for all tasks, `<task name>/demo_k`, simulator states only.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.array_typing import Float64, NpArray
from qvla_jax.data.open_x.columns import Entries
from qvla_jax.data.open_x.instructions import instruction_text
from qvla_jax.data.pictures import Pictures
from qvla_jax.errors import DatasetError

_FRAMES_SUFFIX = "_demo"
_DEMO = re.compile(r"demo_\d+")
# A flattened state is (time, qpos, qvel); the Panda's seven joints come first in qpos.
_ARM_JOINTS = slice(1, 8)


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One demonstration without its frames.

    Attributes:
        file: the HDF5 file, and `group` the path of the demonstration inside it.
        task: name of the task, words joined by underscores.
        instruction: the task in the benchmark's wording ("pick up the black bowl ...").
        seed: seed of the start state, or None if the file does not say.
        noise_sigma: standard deviation of the noise on the executed actions, or None.
        actions: f64[t, 7], the label to be learned, as LIBERO has it (gripper -1 open, +1 close).
        actions_executed: f64[t, 7], what was executed; equal to `actions` if the file has one
            array.
        proprio: f32[t, 8], gripper position (m), axis-angle (rad), two finger positions (m).
        joint_state: f32[t, 7] in rad.
        rewards: f32[t], 1 on the step that reached the goal.
        states: f64[t, s], the flattened simulator state before each action.
        fixtures: pose (position, quaternion; f64[7]) of each fixture, which the state does not
            hold.
    """

    file: Path
    group: str
    task: str
    instruction: str
    bddl_file: str
    seed: int | None
    noise_sigma: float | None
    actions: np.ndarray
    actions_executed: np.ndarray
    proprio: np.ndarray
    joint_state: np.ndarray
    rewards: np.ndarray
    states: np.ndarray
    fixtures: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name unique among the demonstrations of a data set; equal seeds mean equal starts."""
        tail = Path(self.group).name if self.seed is None else f"seed_{self.seed}"
        return f"{self.task}/{tail}"

    def __len__(self) -> int:
        return len(self.actions)


def read_demonstrations(path: str | Path) -> Iterator[Demonstration]:
    """Yields the demonstrations of one HDF5 file, tasks by name and demonstrations by number.

    Raises:
        DatasetError: the file is missing, is not an HDF5 file, or holds no demonstration; or an
            array has the wrong dtype or shape, or a value that is not finite.
    """
    path = Path(path)
    with _open(path) as file:
        # Ignore anything other than groups.
        groups = {_task_of(path, n): group for n, group in file.items() if hasattr(group, "items")}
        count = 0
        for task, group in sorted(groups.items()):
            for name in sorted(
                (n for n in group if _DEMO.fullmatch(n)), key=lambda n: int(n.split("_")[1])
            ):
                count += 1
                yield _read_one(path, task, group, group[name])
    if not count:
        raise DatasetError(f"{path}: no demo_* group found; expected data/demo_k or <task>/demo_k")


def has_frames(demo: Demonstration) -> bool:
    """Tells whether the demonstration's own file holds its frames."""
    with _open(demo.file) as file:
        return "agentview_rgb" in file[demo.group].get("obs", {})


def read_frames(demo: Demonstration) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads both cameras' frames, upright, u8[t, height, width, 3]; None if the file has none."""
    with _open(demo.file) as file:
        group = file[demo.group]
        obs = group.get("obs", {})
        if "agentview_rgb" not in obs:
            return None
        where = f"{demo.file}:{demo.group}"
        image = _pictures(obs, "agentview_rgb", where)
        if "eye_in_hand_rgb" in obs:
            wrist = _pictures(obs, "eye_in_hand_rgb", where)
        elif "eye_in_hand_jpeg" in obs:
            files = Pictures(
                stored=[data.tobytes() for data in obs["eye_in_hand_jpeg"][:]],
                size=(None, None),
                feature="obs/eye_in_hand_jpeg",
                episode=where,
                first_step=0,
            )
            wrist = files.decode_all()
        else:
            raise DatasetError(
                f"{where}: obs has agentview_rgb but neither eye_in_hand_rgb nor eye_in_hand_jpeg"
            )
        # LIBERO stores OpenGL's bottom-up rows; every public RLDS set rotates them by 180 degrees.
        if group.parent.attrs.get("macros_image_convention") != "rotated180":
            image, wrist = image[:, ::-1, ::-1], wrist[:, ::-1, ::-1]
        return image, wrist


def _open(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DatasetError("reading HDF5 demonstrations needs h5py: pip install h5py") from error
    if not path.is_file():
        raise DatasetError(f"{path}: no such demonstration file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: not a readable HDF5 file ({error})") from error


def _task_of(path: Path, group_name: str) -> str:
    return path.stem.removesuffix(_FRAMES_SUFFIX) if group_name == "data" else group_name


def _pictures(obs: Any, name: str, where: str) -> np.ndarray:
    pictures = obs[name]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise DatasetError(
            f"{where}: obs/{name}: expected pictures uint8 [t, H, W, 3], found {pictures.dtype} "
            f"{list(pictures.shape)}"
        )
    return pictures[:]


def _numbers(group: Any, name: str, width: int | None = None) -> Float64[NpArray, "t d"]:
    """An array of a demonstration, checked; `width` is the number of its columns."""
    array = group[name]
    if not hasattr(array, "shape") or len(array.shape) != (1 if width == 1 else 2):
        raise DatasetError(f"{name}: expected {'t' if width == 1 else '[t, n]'} numbers")
    values = Entries(name).of(array[:])
    if width not in (None, values.shape[1]):
        raise DatasetError(
            f"{name}: expected {width} entries in each step, found {values.shape[1]}"
        )
    return values


def _text(attributes: Any, name: str, default: str) -> str:
    """An attribute, which may be bytes or an array with one text."""
    try:
        return instruction_text(attributes.get(name, default))
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from error


def _read_one(path: Path, task: str, parent: Any, group: Any) -> Demonstration:
    try:
        return _demonstration(path, task, parent, group)
    except DatasetError as error:
        raise DatasetError(f"{path}:{group.name}: {error}") from error
    except (OSError, TypeError, ValueError) as error:
        # What h5py raises for a damaged or foreign array or attribute.
        raise DatasetError(f"{path}:{group.name}: cannot be read ({error})") from error


def _demonstration(path: Path, task: str, parent: Any, group: Any) -> Demonstration:
    missing = [name for name in ("actions", "states") if name not in group]
    if missing:
        raise DatasetError(f"missing {', '.join(missing)}; has {', '.join(sorted(group))}")
    actions, states = _numbers(group, "actions", 7), _numbers(group, "states")
    obs = group.get("obs", {})
    if "proprio" in group:
        proprio = _numbers(group, "proprio", 8)
    elif "ee_states" in obs and "gripper_states" in obs:
        pose, fingers = (
            _numbers(group, f"obs/{name}", n)
            for name, n in (("ee_states", 6), ("gripper_states", 2))
        )
        if len(pose) != len(fingers):
            raise DatasetError("obs/ee_states and obs/gripper_states differ in length")
        proprio = np.concatenate([pose, fingers], axis=1)
    else:
        raise DatasetError("no proprio, and no obs/ee_states with obs/gripper_states")
    has_joints = "joint_states" in obs
    joints = _numbers(group, "obs/joint_states", 7) if has_joints else states[:, _ARM_JOINTS]
    if "rewards" in group:
        rewards = _numbers(group, "rewards", 1)[:, 0]
    else:  # Only successes are stored, and each ends with the step that succeeded.
        rewards = np.zeros(len(actions))
        rewards[-1:] = 1.0
    executed = _numbers(group, "actions_executed", 7) if "actions_executed" in group else actions
    arrays = (actions, executed, states, proprio, joints, rewards)
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or lengths == {0}:
        raise DatasetError(f"arrays disagree in length, or are empty: {sorted(lengths)}")
    attrs = group.attrs
    fixtures = dict(
        zip(
            json.loads(attrs.get("fixture_names", "[]")),
            np.asarray(attrs.get("fixture_pose", np.zeros((0, 7))), np.float64),
            strict=True,
        )
    )
    return Demonstration(
        file=path,
        group=group.name,
        task=task,
        instruction=_text(parent.attrs, "task_language", task.replace("_", " ")).lower(),
        bddl_file=Path(_text(parent.attrs, "bddl_file_name", f"{task}.bddl")).name,
        seed=int(attrs["seed"]) if "seed" in attrs else None,
        noise_sigma=float(attrs["noise_sigma"]) if "noise_sigma" in attrs else None,
        actions=actions,
        actions_executed=executed,
        proprio=proprio.astype(np.float32),
        joint_state=joints.astype(np.float32),
        rewards=rewards.astype(np.float32),
        states=states,
        fixtures=fixtures,
    )
