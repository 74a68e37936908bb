"""A scripted expert for LIBERO-Spatial and LIBERO-Object, from the simulator's state.

It is memoryless: its action depends only on the current state, so it can label any state that a
learner visits. The phase (reach, close, carry, release) follows from the fingers and the distances.
Motion is a funnel: the target height rises with the horizontal distance from the target, and
sideways motion waits until the gripper is nearly that high, so nothing on the way is knocked over.
Gains are proportional and saturate.

Actions are LIBERO's: changes of position and rotation of the operational-space controller, in
[-1, 1] (0.05 m and 0.5 rad each), and the gripper (-1 open, +1 close).

    expert = make_expert(environment)
    action = expert(environment.state)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

from qvla_jax.errors import InputError

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray
    from qvla_jax.data.libero.environment import LiberoEnvironment

Phase: TypeAlias = Literal["reach", "close", "carry", "release"]

# Per meter and radian of error: a full action at 7 cm and at half a radian.
_GAIN, _ROTATION_GAIN = 14.0, 2.0
# Caps on an action. The arm is near a singularity at the far side of the table and stalls if fast.
_REACH_CAP, _CARRY_CAP, _ROTATION_CAP = 0.9, 0.8, 0.5
# Pose of the gripper with its fingers down, its finger axis along y.
_DOWN = np.diag([1.0, -1.0, -1.0])
# Widest object (m) that open fingers can take, their distance from its center, and the room they
# need.
_FITS, _FINGER, _FREE = 0.072, 0.048, 0.018
# Height (m) of the hand's underside over the grasp, points along it, and how much thicker than a
# finger it is on both sides.
_PALM, _HAND, _THICKER = 0.033, (0.07, 0.10), 0.02
# Fingers count as correctly oriented below this error (rad).
_TURNED = 0.25


class Expert(Protocol):
    """A function of the simulator's observation."""

    phase: Phase

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state; sets `phase`."""
        ...


def make_expert(environment: "LiberoEnvironment") -> Expert:
    """The expert of a task for the current episode; call this again after a reset.

    Raises:
        InputError: there is no expert for the suite.
    """
    suite = environment.suite.name
    if suite == "libero_spatial":
        return _bowl_expert(environment)
    if suite == "libero_object":
        return _object_expert(environment)
    raise InputError(
        f"{suite}: there is no scripted expert; there is one for libero_spatial and libero_object"
    )


@dataclass
class BowlExpert:
    """Picks up a bowl by its rim and puts it on a plate.

    Attributes:
        bowl: the bowl's name in the state, and `plate` the plate's.
        side: direction from the bowl's center to where its rim is grasped, radians in the world's
            xy.
        radius: distance of the grasp from the center (m), and `lift` the gripper's height over it.
        phase: of the last action.
    """

    bowl: str
    plate: str
    side: float
    radius: float = 0.0535
    lift: float = 0.037
    phase: Phase = "reach"

    # Additional height while 5 cm or more from the grasp, and of the carried bowl over the plate.
    _hover = 0.08
    _carry = 0.085
    # Height of the carried bowl over the cabinet and its open drawer, which are at y < 0.1.
    _cabinet = 1.185
    # Fingers closer than this (m), near the rim, hold it; wider open than `_open` they are open.
    _closed, _open = 0.014, 0.07

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        gripper, opening = state["robot0_eef_pos"], _opening(state)
        bowl, plate = state[f"{self.bowl}_pos"], state[f"{self.plate}_pos"]
        up = rotation_matrix(state[f"{self.bowl}_quat"])[:, 2]
        side = self._side(state)
        outwards = np.array([np.cos(side), np.sin(side), 0.0])
        outwards -= up * (outwards @ up)
        outwards /= np.linalg.norm(outwards)
        error = bowl + outwards * self.radius + up * self.lift - gripper
        sideways = float(np.hypot(error[0], error[1]))
        turn = _turn(state, side)
        from_plate = float(np.hypot(*(bowl - plate)[:2]))
        height = bowl[2] - plate[2]
        near = sideways < 0.03 and abs(error[2]) < 0.035
        action = np.zeros(7)
        action[3:6] = np.clip(turn * _ROTATION_GAIN, -_ROTATION_CAP, _ROTATION_CAP)
        action[6] = -1.0
        if (from_plate < 0.025 and height < 0.014) or (from_plate < 0.018 and height < 0.019):
            self.phase = "release"  # Open, then back off upwards.
            action[2] = 0.6 * _ramp(opening, 0.04, 0.07)
        elif near and 0.001 < opening < self._closed:
            self.phase = "carry"
            target = plate[2] - 0.004 + self._carry * _ramp(from_plate, 0.008, 0.068)
            # Over the cabinet, and once lifted out of the drawer, high enough to clear it.
            over = (1.0 - _ramp(bowl[1], 0.06, 0.10)) * _ramp(bowl[2], 1.0, 1.03)
            target = max(target, over * self._cabinet + (1.0 - over) * target)
            action[:3] = _approach(plate - bowl, target - bowl[2], _CARRY_CAP)
            action[6] = 1.0
        else:
            self.phase = "reach"
            rise = error[2] + self._hover * _ramp(sideways, 0.006, 0.056)
            action[:3] = _approach(error, rise, _REACH_CAP)
            # Once fingers move the tolerance widens, or they would alternate between opening and
            # closing.
            tolerance = 0.010 if opening > self._open else 0.018
            if max(sideways, abs(error[2])) < tolerance and np.abs(turn).max() < _TURNED:
                self.phase = "close"
                action[6] = 1.0
        return action

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
        held = 0.001 < _opening(state) < self._closed
        if not held and offset > self._toward:
            here = False
        elif not held and offset < self._away:
            here = True
        return self.side if here else self.side + np.pi


@dataclass
class ObjectExpert:
    """Picks up an object from above and drops it into a basket.

    Attributes:
        item: the object's name in the state, and `basket` the basket's.
        side: direction of the finger axis, radians in the world's xy.
        offset: from the object's origin to the point that the gripper goes to.
        bottom: height of the object's lowest point over its origin (negative).
        is_held: tells whether both fingers touch the object.
        phase: of the last action.
    """

    item: str
    basket: str
    side: float
    offset: "Float64[NpArray, ' 3']"
    bottom: float
    is_held: Any
    phase: Phase = "reach"

    _hover = 0.10
    # Height of the carried object's bottom over the basket's origin, to pass over the rim.
    _clear = 0.18
    _open = 0.077

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        gripper, opening = state["robot0_eef_pos"], _opening(state)
        item, basket = state[f"{self.item}_pos"], state[f"{self.basket}_pos"]
        error = item + self.offset - gripper
        sideways = float(np.hypot(error[0], error[1]))
        turn = _turn(state, self.side)
        from_basket = float(np.hypot(*(item - basket)[:2]))
        still = np.abs(state["robot0_gripper_qvel"]).max() < 0.02
        action = np.zeros(7)
        action[3:6] = np.clip(turn * _ROTATION_GAIN, -_ROTATION_CAP, _ROTATION_CAP)
        action[6] = -1.0
        if sideways < 0.04 and still and self.is_held():
            target = basket[2] + self._clear - self.bottom
            action[:3] = _approach(basket - item, target - item[2], _CARRY_CAP)
            self.phase = "release" if from_basket < 0.025 else "carry"
            action[6] = -1.0 if self.phase == "release" else 1.0
        elif from_basket < 0.06:
            self.phase = "release"  # It falls, or lies in the basket.
            action[3:6] = 0.0
        else:
            self.phase = "reach"
            rise = error[2] + self._hover * _ramp(sideways, 0.006, 0.056)
            action[:3] = _approach(error, rise, _REACH_CAP)
            tolerance = 0.012 if opening > self._open else 0.020
            if max(sideways, abs(error[2])) < tolerance and np.abs(turn).max() < _TURNED:
                self.phase = "close"
                action[6] = 1.0
        return action


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


def _turn(state: Mapping[str, Any], side: float) -> "Float64[NpArray, ' 3']":
    """Remaining rotation until the finger axis is parallel to `side`, fingers down."""
    # A gripper rotated by half a turn grasps the same, so the smallest yaw is taken.
    yaw = (side + np.pi / 2) % np.pi - np.pi / 2 - np.pi / 2
    yaw = yaw + np.pi if yaw < -np.pi / 2 + 1e-6 else yaw
    c, s = np.cos(yaw), np.sin(yaw)
    desired = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ _DOWN
    return rotation_vector(desired @ rotation_matrix(state["robot0_eef_quat"]).T)


def _opening(state: Mapping[str, Any]) -> float:
    fingers = state["robot0_gripper_qpos"]
    return float(fingers[0] - fingers[1])


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def _approach(error: np.ndarray, rise: float, cap: float) -> "Float64[NpArray, ' 3']":
    """Translation towards a target: sideways only where nearly high enough, capped as a whole."""
    gate = 1.0 - _ramp(rise, 0.02, 0.06)
    motion = _GAIN * np.array([error[0] * gate, error[1] * gate, rise])
    return motion / max(1.0, float(np.abs(motion).max()) / cap)


# Where the rim is grasped, degrees in the world's xy, by task: away from neighboring objects.
_RIM_SIDES = (-90, 156, -90, -90, None, -90, 156, -90, -90, 156)
_TARGET, _PLATE = "akita_black_bowl_1", "plate_1"
_DRAWER = "wooden_cabinet_1_cabinet_top"


def _bowl_expert(environment: "LiberoEnvironment") -> BowlExpert:
    side = _RIM_SIDES[environment.task]
    if side is not None:
        return BowlExpert(_TARGET, _PLATE, float(np.deg2rad(side)))
    simulator = environment.simulator
    model, data = simulator.sim.model._model, simulator.sim.data._data
    drawer = model.body(_DRAWER).id
    frame = data.xmat[drawer].reshape(3, 3)
    along = float(np.arctan2(frame[1, 0], frame[0, 0]))
    return DrawerExpert(
        _TARGET, _PLATE, along, radius=0.048, lift=0.040, drawer=data.xpos[drawer].copy()
    )


def _object_expert(environment: "LiberoEnvironment") -> ObjectExpert:
    simulator = environment.simulator
    item, container = simulator.obj_of_interest[:2]
    basket = container if "basket" in container else "basket_1"
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
        basket=basket,
        side=_free_side(corners[:, :2], others, grasp=origin[2] + lift),
        offset=np.array([centre[0], centre[1], lift]),
        bottom=float(low[2]),
        is_held=lambda: simulator._check_grasp(simulator.robots[0].gripper, geoms),
    )


def _free_side(
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
