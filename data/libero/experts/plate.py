"""An expert that pushes a plate over the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.motion import (
    GAIN,
    REACH_CAP,
    Phase,
    Point,
    capped,
    ramp,
    rotating,
    rotation_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray


@dataclass
class PushExpert:
    """Pushes a plate over the table to a place, from behind, with closed fingers that lean over it.

    Attributes:
        plate: the plate's name in the state.
        place: where it is to go.
        phase: of the last action.
    """

    plate: str
    place: Point
    phase: Phase = "reach"

    # How far the gripper stays back along the fingers until it is in line with its place (m).
    _hover = 0.10
    # From the plate's center back to the gripper when the fingers come down, a few millimeters
    # behind the rim, and the gripper's height over the plate's origin (m).
    _behind, _lift = 0.086, 0.018
    # The hand leans over the plate (rad), away from what is behind it.
    _lean = 0.35
    # How fast it pushes, and how far the gripper aims below its height (m), against riding up.
    _push, _press = 0.2, 0.015

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        plate, gripper = state[f"{self.plate}_pos"], state["robot0_eef_pos"]
        way = (self.place(state) - plate) * np.array([1.0, 1.0, 0.0])
        ahead = way / max(1e-6, float(np.linalg.norm(way)))
        aside = np.array([-ahead[1], ahead[0], 0.0])
        pose = self._pose(ahead)
        turn = rotation_to(state, pose)
        # It turns over the plate, where nothing is in the way.
        unturned = ramp(float(np.abs(turn).max()), 0.15, 0.4)
        error = plate - (1.0 - unturned) * self._behind * ahead - gripper
        error[2] += self._lift
        action = rotating(turn)
        action[6] = 1.0
        beyond, off = float(error @ ahead), float(error @ aside)
        short = 0.03 if abs(error[2]) < 0.012 else 0.012
        if (
            -short < beyond < 0.03
            and abs(off) < 0.025
            and abs(error[2]) < 0.02
            and np.abs(turn).max() < 0.35
        ):
            self.phase = "carry"
            # Not over the rim, which is low.
            low = ramp(error[2], -0.015, -0.006)
            motion = low * capped(GAIN * way, self._push) + GAIN * off * aside
            motion[2] = 2.0 * GAIN * (error[2] - self._press)
            action[:3] = capped(motion, REACH_CAP)
        else:
            self.phase = "reach"
            # Slanting, from over the plate: what is behind it may be in the way.
            depth = float(error @ pose[:, 2])
            across = error - depth * pose[:, 2]
            far = max(ramp(float(np.linalg.norm(across)), 0.008, 0.04), unturned)
            advance = depth - self._hover * far
            gate = 1.0 - ramp(-advance, 0.02, 0.06)
            action[:3] = capped(GAIN * (gate * across + advance * pose[:, 2]), REACH_CAP)
        return action

    def _pose(self, ahead: np.ndarray) -> "Float64[NpArray, '3 3']":
        """Fingers side by side along x, leaning forwards."""
        along = np.array([0.0, np.copysign(1.0, ahead[1]), 0.0])
        inwards = np.array([0.0, 0.0, -np.cos(self._lean)]) - np.sin(self._lean) * along
        # Of the two such orientations the one nearer to the usual.
        fingers = np.array([-1.0, 0.0, 0.0])
        return np.stack([np.cross(fingers, inwards), fingers, inwards], axis=1)
