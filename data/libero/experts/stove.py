"""An expert that turns a stove's knob."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.motion import (
    GAIN,
    REACH_CAP,
    TURNED,
    Phase,
    approach,
    capped,
    ramp,
    rotating,
    turn_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray


@dataclass
class KnobExpert:
    """Turns a knob by its fin: open fingers come down around one end of it and push sideways.

    Attributes:
        pivot: the knob's center, at the height of the grasp (m).
        angle: tells the direction of the fin's end in the world's xy (rad).
        radius: distance of the grasp from the pivot (m).
        phase: of the last action.
    """

    pivot: "Float64[NpArray, ' 3']"
    angle: Callable[[], float]
    radius: float
    phase: Phase = "reach"

    _hover = 0.10
    # The stove is so near to the robot's base that a faster arm runs into the limits of its joints.
    _cap = 0.4
    # How far the gripper may be off (m) while it pushes: along the push, along the fin, in height.
    _across, _along, _height = 0.045, 0.02, 0.012

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        c, s = np.cos(self.angle()), np.sin(self.angle())
        fin, push = np.array([c, s, 0.0]), np.array([-s, c, 0.0])
        error = self.pivot + fin * self.radius - state["robot0_eef_pos"]
        turn = turn_to(state, np.pi / 2)
        action = rotating(turn)
        around = abs(error @ push) < self._across and abs(error @ fin) < self._along
        if around and abs(error[2]) < self._height and np.abs(turn).max() < TURNED:
            self.phase = "carry"
            action[:3] = capped(GAIN * (error - (error @ push) * push + 0.05 * push), REACH_CAP)
        else:
            self.phase = "reach"
            sideways = float(np.hypot(error[0], error[1]))
            rise = error[2] + self._hover * ramp(sideways, 0.01, 0.06)
            action[:3] = approach(error, rise, self._cap)
        return action
