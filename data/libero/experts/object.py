"""An expert that picks up objects from above."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    turn_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray
    from qvla_jax.data.libero.environment import LiberoEnvironment

# Widest object (m) that open fingers can take, their distance from its center, and the room they
# need.
_FITS, _FINGER, _FREE = 0.072, 0.048, 0.018
# Height (m) of the hand's underside over the grasp, points along it, and how much thicker than a
# finger it is on both sides.
_PALM, _HAND, _THICKER = 0.033, (0.07, 0.10), 0.02


@dataclass
class ObjectExpert:
    """Picks up an object from above and drops it into a basket, or lowers it onto a place.

    Attributes:
        item: the object's name in the state.
        place: where the basket is, or what stands for one.
        side: direction of the finger axis, radians in the world's xy.
        offset: from the object's origin to the point that the gripper goes to.
        bottom: height of the object's lowest point over its origin (negative).
        is_held: tells whether both fingers touch the object.
        clear: height of the carried object's lowest point over the place, to pass over the rim.
        drop: the same where it is released.
        phase: of the last action.
    """

    item: str
    place: Point
    side: float
    offset: "Float64[NpArray, ' 3']"
    bottom: float
    is_held: Any
    clear: float
    drop: float
    phase: Phase = "reach"

    _hover = 0.10
    _open = 0.077

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        gripper, opening = state["robot0_eef_pos"], opening_of(state)
        item, place = state[f"{self.item}_pos"], self.place(state)
        error = item + self.offset - gripper
        sideways = float(np.hypot(error[0], error[1]))
        turn = turn_to(state, self.side)
        away = float(np.hypot(*(item - place)[:2]))
        still = np.abs(state["robot0_gripper_qvel"]).max() < 0.02
        action = rotating(turn)
        if sideways < 0.04 and still and self.is_held():
            height = self.drop + (self.clear - self.drop) * ramp(away, 0.01, 0.06)
            rise = place[2] + height - self.bottom - item[2]
            action[:3] = approach(place - item, rise, CARRY_CAP)
            self.phase = "release" if away < 0.025 and rise > -0.02 else "carry"
            action[6] = -1.0 if self.phase == "release" else 1.0
        elif away < 0.06:
            self.phase = "release"  # It falls, or lies in the basket.
            action[3:6] = 0.0
        else:
            tolerance = 0.012 if opening > self._open else 0.020
            self.phase = reach_grasp(action, error, turn, hover=self._hover, tolerance=tolerance)
        return action


def object_expert(environment: "LiberoEnvironment") -> ObjectExpert:
    """The expert of a task of LIBERO-Object."""
    item, container = environment.simulator.obj_of_interest[:2]
    basket = container if "basket" in container else "basket_1"
    return grasp_of(environment, item, position_of(basket))


def grasp_of(
    environment: "LiberoEnvironment",
    item: str,
    place: Point,
    *,
    clear: float = 0.18,
    drop: float = 0.18,
) -> ObjectExpert:
    """The expert that grasps an object near its top, where fingers and hand are free.

    Args:
        environment: the episode's environment.
        item: the object's name.
        place: where it is to go.
        clear: as in `ObjectExpert`.
        drop: as in `ObjectExpert`.
    """
    simulator = environment.simulator
    data = simulator.sim.data._data
    geoms = simulator.objects_dict[item].contact_geoms
    corners = _corners(simulator.sim.model._model, data, geoms)
    origin = data.xpos[simulator.obj_body_id[item]]
    low, high = corners.min(axis=0) - origin, corners.max(axis=0) - origin
    centre = (low + high) / 2.0
    others = [
        _corners(simulator.sim.model._model, data, other.contact_geoms)
        for name, other in simulator.objects_dict.items()
        if name != item
    ]
    lift = max(high[2] - 0.035, low[2] + 0.010)
    return ObjectExpert(
        item=item,
        place=place,
        side=free_side(corners[:, :2], others, grasp=origin[2] + lift),
        offset=np.array([centre[0], centre[1], lift]),
        bottom=float(low[2]),
        is_held=lambda: simulator._check_grasp(simulator.robots[0].gripper, geoms),
        clear=clear,
        drop=drop,
    )


def free_side(
    points: "Float64[NpArray, 'n 2']",
    others: Sequence["Float64[NpArray, 'm 3']"],
    *,
    grasp: float,
) -> float:
    """Direction across which the fingers close on an object.

    Along y if the object fits between the fingers, and fingers and hand come down clear of other
    objects; else across the narrowest side where they do.

    Args:
        points: corners of the object in the world's xy.
        others: corners of each other object.
        grasp: height of the grasp.
    """
    angles = np.deg2rad(np.arange(0, 180, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    widths = np.ptp(points @ axes.T, axis=0)
    fits = np.flatnonzero(widths < _FITS)
    if not len(fits):
        return float(angles[int(np.argmin(widths))])
    centre = (points.min(axis=0) + points.max(axis=0)) / 2.0
    room = np.array([_room(centre, axes[i], others, grasp) for i in fits])
    default = np.flatnonzero(fits == len(angles) // 2)
    if len(default) and room[default[0]] >= _FREE:
        return float(np.pi / 2)
    # The roomiest, and among those with enough room the narrowest.
    return float(angles[max(zip(np.minimum(room, _FREE), -widths[fits], fits, strict=True))[2]])


def _room(
    centre: np.ndarray,
    axis: np.ndarray,
    others: Sequence["Float64[NpArray, 'm 3']"],
    grasp: float,
) -> float:
    """Distance (m) from where fingers and hand come down to the nearest box around an object."""
    nearest = np.inf
    for points in others:
        low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
        tall = points[:, 2].max() > grasp + _PALM
        for reach in (_FINGER, *(_HAND if tall else ())):
            for place in (centre + reach * axis, centre - reach * axis):
                gap = np.linalg.norm(np.maximum(np.maximum(low - place, place - high), 0.0))
                nearest = min(nearest, float(gap) - (_THICKER if reach > _FINGER else 0.0))
    return nearest


def _corners(model: Any, data: Any, geoms: list[str]) -> "Float64[NpArray, 'n 3']":
    """Corners of the boxes around an object's collision shapes, in the world."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    points = []
    for name in geoms:
        geom = model.geom(name).id
        # Half sizes and center of the box in the shape's own frame, for every type.
        centre, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
        frame = data.geom_xmat[geom].reshape(3, 3)
        points.append(data.geom_xpos[geom] + (centre + signs * half) @ frame.T)
    return np.concatenate(points)
