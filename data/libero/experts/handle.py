"""Experts that open a drawer by its handle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.motion import (
    CARRY_CAP,
    GAIN,
    REACH_CAP,
    TURNED,
    Phase,
    capped,
    opening_of,
    ramp,
    rotating,
    rotation_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray


@dataclass
class HandleExpert:
    """Pulls a drawer open: the gripper, nearly horizontal, takes the handle's bar and moves away.

    Attributes:
        handle: where the middle of the bar is.
        pull: direction in which the drawer opens, a unit vector in the world's xy.
        pose: orientation of the gripper, its approach (third column) against `pull`.
        phase: of the last action.
    """

    handle: Callable[[], "Float64[NpArray, ' 3']"]
    pull: "Float64[NpArray, ' 3']"
    pose: "Float64[NpArray, '3 3']"
    phase: Phase = "reach"

    # Distance from the bar until the gripper is in line with it.
    _standoff = 0.10
    _offset = 0.008
    # Fingers this close (m), but not closed, have the bar between them.
    _closed, _bar = 0.008, 0.03

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        inwards = self.pose[:, 2]
        error = self.handle() + self._offset * self.pull - state["robot0_eef_pos"]
        turn = rotation_to(state, self.pose)
        turned = float(np.abs(turn).max())
        action = rotating(turn)
        depth = float(error @ inwards)
        across = error - depth * inwards
        aside = float(np.linalg.norm(across))
        opening = opening_of(state)
        still = np.abs(state["robot0_gripper_qvel"]).max() < 0.02
        if aside < 0.03 and abs(depth) < 0.04 and still and self._closed < opening < self._bar:
            self.phase = "carry"
            action[:3] = capped(GAIN * (across - (across @ self.pull) * self.pull) + CARRY_CAP * self.pull, CARRY_CAP)
            action[6] = 1.0
            return action
        self.phase = "reach"
        # In line with the bar, and turned, before the fingers come near it.
        far = max(ramp(aside, 0.008, 0.04), ramp(turned, 0.15, 0.4))
        advance = depth - self._standoff * far
        gate = 1.0 - ramp(-advance, 0.02, 0.06)
        action[:3] = capped(GAIN * (gate * across + advance * inwards), REACH_CAP)
        tolerance = 0.010 if opening > 0.077 else 0.020
        if max(aside, abs(depth)) < tolerance and turned < TURNED:
            self.phase = "close"
            action[6] = 1.0
        self.debug = (aside, depth, turned)
        return action
