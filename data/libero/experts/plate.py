"""An expert that pushes a plate over the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.motion import (
    CARRY_CAP,
    GAIN,
    REACH_CAP,
    TURNED,
    Phase,
    Point,
    approach,
    capped,
    ramp,
    rotating,
    turn_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray


@dataclass
class PushExpert:
    """Presses open fingers into a plate and drags it to a place.

    Attributes:
        plate: the plate's name in the state.
        place: where it is to go.
        phase: of the last action.
    """

    plate: str
    place: Point
    phase: Phase = "reach"

    _hover = 0.10
    # Height (m) of the gripper over the plate's origin where its fingers touch it, and how deep
    # they press.
    _touch, _press = 0.024, 0.015

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        plate = state[f"{self.plate}_pos"]
        error = plate + np.array([0.0, 0.0, self._touch]) - state["robot0_eef_pos"]
        sideways = float(np.hypot(error[0], error[1]))
        turn = turn_to(state, np.pi / 2)
        action = rotating(turn)
        if sideways < 0.03 and error[2] > -0.008 and np.abs(turn).max() < TURNED:
            self.phase = "carry"
            motion = GAIN * (self.place(state) - plate)
            motion[2] = GAIN * (error[2] - self._press)
            action[:3] = capped(motion, CARRY_CAP)
        else:
            self.phase = "reach"
            rise = error[2] - 0.005 + self._hover * ramp(sideways, 0.006, 0.056)
            action[:3] = approach(error, rise, REACH_CAP)
        return action
