"""The encodings of gripper and rotation in data sets, by name, and their conversion.

Every function takes a whole episode of `t` steps, because some encodings only record changes.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

import numpy as np

from qvla_jax.array_typing import Float64, NpArray

GripperEncoding: TypeAlias = Literal[
    "open",
    "closed",
    "open_signed",
    "closed_signed",
    "open_settled",
    "closing",
    "always_open",
    "always_closed",
]
RotationEncoding: TypeAlias = Literal["euler", "axis_angle", "quaternion", "none"]
Movement: TypeAlias = Literal["delta", "velocity", "reached", "absolute"]

Gripper: TypeAlias = Float64[NpArray, " t"]

# How far a relative command must be from 0 to count, and where a gripper counts as settled.
# Thresholds of the public transforms.
_COMMAND: Final = 0.1
_SETTLED_OPEN, _SETTLED_CLOSED = 0.95, 0.05
_GIMBAL: Final = 1e-6


def _open(gripper: Gripper) -> Gripper:
    return gripper


def _closed(gripper: Gripper) -> Gripper:
    return 1.0 - gripper


def _open_signed(gripper: Gripper) -> Gripper:
    return np.clip(gripper, 0.0, 1.0)


def _closed_signed(gripper: Gripper) -> Gripper:
    return 1.0 - np.clip(gripper, 0.0, 1.0)


def open_settled(gripper: Gripper) -> Gripper:
    """Open or closed, depending on where the gripper settles next.

    A last stretch that never settles keeps the last value.
    """
    is_open = gripper > _SETTLED_OPEN
    settled = is_open | (gripper < _SETTLED_CLOSED)
    steps = np.arange(len(gripper))
    following = np.minimum.accumulate(np.where(settled, steps, len(gripper))[::-1])[::-1]
    return np.append(is_open.astype(np.float64), gripper[-1:])[following]


def closing(gripper: Gripper) -> Gripper:
    """The state resulting from commands: positive closes, negative opens, near 0 changes nothing.

    Before the first command the gripper is in the opposite state; without any command it is open.
    """
    state = np.where(gripper < -_COMMAND, 1.0, np.where(gripper > _COMMAND, 0.0, np.nan))
    commands = np.flatnonzero(~np.isnan(state))
    if not len(commands):
        return np.ones_like(gripper)
    last = np.searchsorted(commands, np.arange(len(gripper)), side="right") - 1
    return np.where(last < 0, 1.0 - state[commands[0]], state[commands[np.maximum(last, 0)]])


# Each gives 1 for open and 0 for closed.
GRIPPERS: Final[Mapping[GripperEncoding, Callable[[Gripper], Gripper]]] = {
    # 1 open, 0 closed; also booleans.
    "open": _open,
    # 1 closed, 0 open.
    "closed": _closed,
    # 1 open, -1 (or 0) closed.
    "open_signed": _open_signed,
    # 1 closed, -1 (or 0) open.
    "closed_signed": _closed_signed,
    "open_settled": open_settled,
    "closing": closing,
    # No gripper, or none that the action moves.
    "always_open": np.ones_like,
    "always_closed": np.zeros_like,
}
# The encodings that read nothing.
CONSTANT_GRIPPERS: Final = ("always_open", "always_closed")

# How many numbers each stores.
ROTATIONS: Final[Mapping[RotationEncoding, int]] = {
    "euler": 3,
    "axis_angle": 3,
    "quaternion": 4,
    "none": 0,
}


def to_three(
    rotation: Float64[NpArray, "t d"], encoding: RotationEncoding
) -> Float64[NpArray, "t 3"]:
    """A rotation as three numbers.

    Euler angles and axis-angles are not converted: for the small rotations of one step they agree
    to first order, and the public checkpoints were trained on them as stored.
    """
    if encoding == "none":
        return np.zeros((len(rotation), 3))
    return quaternion_to_euler(rotation) if encoding == "quaternion" else rotation


def quaternion_to_euler(q: Float64[NpArray, "t 4"]) -> Float64[NpArray, "t 3"]:
    """Unit quaternions (x, y, z, w) to angles about the fixed axes x, then y, then z, in rad.

    If the second is a right angle, the third is set to 0.
    """
    x, y, z, w = q.T
    sine = np.clip(2 * (w * y - x * z), -1.0, 1.0)
    first = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    third = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    locked = np.abs(sine) > 1 - _GIMBAL
    side = np.sign(sine)
    alone = np.arctan2(side * 2 * (x * y - w * z), side * 2 * (x * z + w * y))
    return np.stack(
        [np.where(locked, alone, first), np.arcsin(sine), np.where(locked, 0.0, third)], axis=1
    )
