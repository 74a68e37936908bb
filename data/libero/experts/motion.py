"""Motion that the experts share, and the noise on their actions."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray

Phase: TypeAlias = Literal["reach", "close", "carry", "release"]
# Where something is in a state (m).
Point: TypeAlias = "Callable[[Mapping[str, Any]], Float64[NpArray, ' 3']]"

# Per meter and radian of error: a full action at 7 cm and at half a radian.
GAIN, ROTATION_GAIN = 14.0, 2.0
# Caps on an action. The arm is near a singularity at the far side of the table and stalls if fast.
REACH_CAP, CARRY_CAP, ROTATION_CAP = 0.9, 0.8, 0.5
# Pose of the gripper with its fingers down, its finger axis along y.
_DOWN = np.diag([1.0, -1.0, -1.0])
# Fingers count as correctly oriented below this error (rad).
TURNED = 0.25


class Expert(Protocol):
    """A function of the simulator's observation."""

    phase: Phase

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state; sets `phase`."""
        ...


def position_of(name: str) -> Point:
    """Where the object of a name is."""
    return lambda state: state[f"{name}_pos"]


def rotation_matrix(quaternion: "Float64[NpArray, ' 4']") -> "Float64[NpArray, '3 3']":
    """Matrix of a unit quaternion with w last."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(matrix: "Float64[NpArray, '3 3']") -> "Float64[NpArray, ' 3']":
    """Axis times angle of a rotation matrix, for angles well below pi."""
    angle = np.arccos(np.clip((np.trace(matrix) - 1.0) / 2.0, -1.0, 1.0))
    axis = 0.5 * np.array(
        [
            matrix[2, 1] - matrix[1, 2],
            matrix[0, 2] - matrix[2, 0],
            matrix[1, 0] - matrix[0, 1],
        ]
    )
    sine = float(np.linalg.norm(axis))
    return axis if sine < 1e-9 else axis / sine * angle


def turn_to(state: Mapping[str, Any], side: float) -> "Float64[NpArray, ' 3']":
    """Remaining rotation until the finger axis is parallel to `side`, fingers down."""
    # A gripper rotated by half a turn grasps the same, so the smallest yaw is taken.
    yaw = (side + np.pi / 2) % np.pi - np.pi / 2 - np.pi / 2
    yaw = yaw + np.pi if yaw < -np.pi / 2 + 1e-6 else yaw
    c, s = np.cos(yaw), np.sin(yaw)
    desired = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ _DOWN
    return rotation_to(state, desired)


def rotation_to(
    state: Mapping[str, Any], desired: "Float64[NpArray, '3 3']"
) -> "Float64[NpArray, ' 3']":
    """Remaining rotation until the gripper has an orientation."""
    return rotation_vector(desired @ rotation_matrix(state["robot0_eef_quat"]).T)


def rotating(turn: "Float64[NpArray, ' 3']") -> "Float64[NpArray, ' 7']":
    """An action that turns the gripper, which is open and stays where it is."""
    rotation = np.clip(turn * ROTATION_GAIN, -ROTATION_CAP, ROTATION_CAP)
    return np.concatenate([np.zeros(3), rotation, [-1.0]])


def capped(motion: "Float64[NpArray, ' 3']", cap: float) -> "Float64[NpArray, ' 3']":
    """A translation whose largest component is at most `cap`."""
    return motion / max(1.0, float(np.abs(motion).max()) / cap)


def opening_of(state: Mapping[str, Any]) -> float:
    """Distance between the fingers (m)."""
    fingers = state["robot0_gripper_qpos"]
    return float(fingers[0] - fingers[1])


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def approach(error: np.ndarray, rise: float, cap: float) -> "Float64[NpArray, ' 3']":
    """Translation towards a target: sideways only where nearly high enough, capped as a whole."""
    gate = 1.0 - ramp(rise, 0.02, 0.06)
    motion = GAIN * np.array([error[0] * gate, error[1] * gate, rise])
    return capped(motion, cap)


def reach_grasp(
    action: "Float64[NpArray, ' 7']",
    error: "Float64[NpArray, ' 3']",
    turn: "Float64[NpArray, ' 3']",
    *,
    hover: float,
    tolerance: float,
) -> Phase:
    """Has an action go to a grasp from above, and close the fingers there.

    Args:
        action: from `rotating`; its translation and its gripper are set.
        error: from the gripper to the grasp (m).
        turn: remaining rotation (rad).
        hover: additional height while 5 cm or more from the grasp (m).
        tolerance: largest error at which the fingers close (m).

    Returns:
        "reach" or "close".
    """
    sideways = float(np.hypot(error[0], error[1]))
    rise = error[2] + hover * ramp(sideways, 0.006, 0.056)
    action[:3] = approach(error, rise, REACH_CAP)
    if max(sideways, abs(error[2])) < tolerance and np.abs(turn).max() < TURNED:
        action[6] = 1.0
        return "close"
    return "reach"


class SmoothNoise:
    """Noise that a demonstration executes on top of the expert's action, correlated in time.

    Autoregressive of first order, at a quarter of its strength while the fingers move. The label
    stays the expert's own action.
    """

    def __init__(self, rng: np.random.Generator, sigma: float, *, correlation: float = 0.9):
        """`sigma` is the standard deviation on the translation; a quarter on the rotation."""
        self._rng, self._correlation = rng, correlation
        self._sigma = sigma * np.array([1.0, 1.0, 1.0, 0.25, 0.25, 0.25])
        self._noise = np.zeros(6)

    def __call__(self, action: "Float64[NpArray, ' 7']", phase: Phase) -> "Float64[NpArray, ' 7']":
        """The action to execute; the argument is not changed."""
        fresh = np.sqrt(1.0 - self._correlation**2) * self._sigma
        self._noise = self._correlation * self._noise + fresh * self._rng.standard_normal(6)
        strength = 0.25 if phase in ("close", "release") else 1.0
        noisy = action.copy()
        noisy[:6] = np.clip(action[:6] + strength * self._noise, -1.0, 1.0)
        return noisy
