"""Experts that pick up a bowl by its rim."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.motion import (
    CARRY_CAP,
    Phase,
    Point,
    approach,
    opening_of,
    position_of,
    ramp,
    reach_grasp,
    rotating,
    rotation_matrix,
    turn_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray
    from qvla_jax.data.libero.environment import LiberoEnvironment


@dataclass
class BowlExpert:
    """Picks up a bowl by its rim and puts it on a plate, or another place.

    Attributes:
        bowl: the bowl's name in the state.
        place: where the plate is, or what stands for one.
        side: direction from the bowl's center to where its rim is grasped, radians in the world's
            xy.
        radius: distance of the grasp from the center (m), and `lift` the gripper's height over it.
        over_cabinet: height of the carried bowl over a cabinet at y < 0.1 and its open drawer; 0
            where there is none on the way.
        phase: of the last action.
    """

    bowl: str
    place: Point
    side: float
    radius: float = 0.0535
    lift: float = 0.037
    over_cabinet: float = 1.185
    phase: Phase = "reach"

    # Additional height while 5 cm or more from the grasp, and of the carried bowl over the plate.
    _hover = 0.08
    _carry = 0.085
    # Fingers closer than this (m), near the rim, hold it; wider open than `_open` they are open.
    _closed, _open = 0.014, 0.07

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        opening = opening_of(state)
        bowl, plate = state[f"{self.bowl}_pos"], self.place(state)
        side = self._side(state)
        error = self._error(state, side)
        turn = turn_to(state, side)
        from_plate = float(np.hypot(*(bowl - plate)[:2]))
        height = bowl[2] - plate[2]
        action = rotating(turn)
        if (from_plate < 0.025 and height < 0.014) or (from_plate < 0.018 and height < 0.019):
            self.phase = "release"  # Open, then back off upwards.
            action[2] = 0.6 * ramp(opening, 0.04, 0.07)
        elif self.holds(state):
            self.phase = "carry"
            target = plate[2] - 0.004 + self._carry * ramp(from_plate, 0.008, 0.068)
            # Over the cabinet, and once lifted out of the drawer, high enough to clear it.
            over = (1.0 - ramp(bowl[1], 0.06, 0.10)) * ramp(bowl[2], 1.0, 1.03)
            target = max(target, over * self.over_cabinet + (1.0 - over) * target)
            action[:3] = approach(plate - bowl, target - bowl[2], CARRY_CAP)
            action[6] = 1.0
        else:
            # Once fingers move the tolerance widens, or they would alternate between opening and
            # closing.
            tolerance = 0.010 if opening > self._open else 0.018
            self.phase = reach_grasp(action, error, turn, hover=self._hover, tolerance=tolerance)
        return action

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether closed fingers have the rim between them."""
        error = self._error(state, self._side(state))
        near = np.hypot(error[0], error[1]) < 0.03 and abs(error[2]) < 0.035
        return bool(near and 0.001 < opening_of(state) < self._closed)

    def _error(self, state: Mapping[str, Any], side: float) -> "Float64[NpArray, ' 3']":
        """From the gripper to where it grasps the rim (m)."""
        up = rotation_matrix(state[f"{self.bowl}_quat"])[:, 2]
        outwards = np.array([np.cos(side), np.sin(side), 0.0])
        outwards -= up * (outwards @ up)
        outwards /= np.linalg.norm(outwards)
        grasp = state[f"{self.bowl}_pos"] + outwards * self.radius + up * self.lift
        return grasp - state["robot0_eef_pos"]

    def _side(self, state: Mapping[str, Any]) -> float:
        """Where the rim is grasped in this state, radians."""
        del state
        return self.side


@dataclass
class DrawerExpert(BowlExpert):
    """Picks a bowl out of a drawer that is hardly wider than the bowl and the fingers.

    The rim is grasped along the drawer's width, at `side` or opposite. Near the middle both sides
    have room for the outer finger, and the side nearer to the gripper is chosen: a learner whose
    choice depended on millimeters would waver between them.

    Attributes:
        drawer: center of the drawer in the world (m).
    """

    drawer: "Float64[NpArray, ' 3']" = field(kw_only=True)

    # How far (m) the bowl may be off the drawer's center, toward `side` and away from it, for a
    # grasp at `side`, and opposite; measured with both grasps from 30 initial states.
    _toward, _away = 0.009, -0.002

    def _side(self, state: Mapping[str, Any]) -> float:
        """Where the rim is grasped in this state, radians."""
        axis = np.array([np.cos(self.side), np.sin(self.side), 0.0])
        bowl = state[f"{self.bowl}_pos"]
        offset = float(axis @ (bowl - self.drawer))
        here = float(axis @ (state["robot0_eef_pos"] - bowl)) > 0.0
        held = 0.001 < opening_of(state) < self._closed
        if not held and offset > self._toward:
            here = False
        elif not held and offset < self._away:
            here = True
        return self.side if here else self.side + np.pi


# Where the rim is grasped, degrees in the world's xy, by task: away from neighboring objects.
_RIM_SIDES = (-90, 156, -90, -90, None, -90, 156, -90, -90, 156)
_TARGET, _PLATE = "akita_black_bowl_1", "plate_1"
_DRAWER = "wooden_cabinet_1_cabinet_top"


def bowl_expert(environment: "LiberoEnvironment") -> BowlExpert:
    """The expert of a task of LIBERO-Spatial."""
    side, plate = _RIM_SIDES[environment.task], position_of(_PLATE)
    if side is not None:
        return BowlExpert(_TARGET, plate, float(np.deg2rad(side)))
    simulator = environment.simulator
    model, data = simulator.sim.model._model, simulator.sim.data._data
    drawer = model.body(_DRAWER).id
    frame = data.xmat[drawer].reshape(3, 3)
    along = float(np.arctan2(frame[1, 0], frame[0, 0]))
    return DrawerExpert(
        _TARGET, plate, along, radius=0.048, lift=0.040, drawer=data.xpos[drawer].copy()
    )
