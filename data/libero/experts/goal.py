"""Experts of LIBERO-Goal, chosen by what the definition of a task asks for."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qvla_jax.data.libero.experts.bowl import BowlExpert
from qvla_jax.data.libero.experts.drawer import HandleExpert, StowExpert
from qvla_jax.data.libero.experts.motion import Expert, Point, position_of
from qvla_jax.data.libero.experts.object import grasp_of
from qvla_jax.data.libero.experts.stove import KnobExpert
from qvla_jax.errors import InputError

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray
    from qvla_jax.data.libero.environment import LiberoEnvironment

# From the center of a region to where a bowl or a bottle is put (m): the top of the stove; off the
# middle of the cabinet, nearer to the robot; on the slope of the rack, behind its lip.
_SHIFTS: Final = {
    "flat_stove_1_cook_region": (0.0, 0.0, 0.022),
    "wooden_cabinet_1_top_side": (-0.02, 0.02, 0.0),
    "wine_rack_1_top_region": (0.0, -0.045, 0.035),
}
# Where a bowl's rim is grasped, radians in the world's xy: away from the cabinet, and beside its
# open drawer.
_SIDE, _SIDE_BY_DRAWER = np.pi / 2, np.pi
# How far the gripper is turned from pointing down to take a handle (rad): the hand fits between the
# handle above and the plate below.
_TILT = float(np.deg2rad(75.0))
# The knob's fin: height of the grasp over the knob's origin, distance from its axis (m).
_FIN = (0.036, 0.036)
# Half the depth of the cabinet's top, from the drawer's handle to the inner face of its front, the
# height of a place in the drawer under the center of its region, all in m.
_TOP, _FRONT, _UNDER = 0.0944, 0.0366, 0.008
# How high over a bowl something passes its rim and is dropped; over a place where a bottle is put
# upright it moves this high, and goes down until it stands (m).
_RIM, _OVER, _DOWN = 0.065, 0.04, -0.02


def goal_expert(environment: "LiberoEnvironment") -> Expert:
    """The expert of a task of LIBERO-Goal.

    Raises:
        InputError: there is none for this task.
    """
    predicate, item, *where = environment.simulator.parsed_problem["goal_state"][0]
    if predicate == "turnon":
        return _knob_expert(environment, item)
    if predicate == "open":
        return _handle_expert(environment, item)
    if predicate == "in" and item.startswith("akita_black_bowl"):
        return _stow_expert(environment, item, where[0])
    expert = _on(environment, item, where[0]) if predicate == "on" else None
    if expert is None:
        raise InputError(
            f"{environment.name}: there is no scripted expert for this task; name "
            "others with --tasks"
        )
    return expert


def _on(environment: "LiberoEnvironment", item: str, where: str) -> Expert | None:
    """The expert that puts an object onto something; None for a plate to be pushed, and others."""
    if item.startswith("akita_black_bowl"):
        return BowlExpert(item, _place(environment, where), _SIDE, over_cabinet=0.0)
    if item.startswith("cream_cheese"):
        return grasp_of(environment, item, _place(environment, where), clear=_RIM, drop=_RIM)
    if item.startswith("wine_bottle"):
        return grasp_of(environment, item, _place(environment, where), clear=_OVER, drop=_DOWN)
    return None


def _place(environment: "LiberoEnvironment", name: str) -> Point:
    """Where something is put: an object, which may move, or a region of a fixture or the table."""
    if name in environment.simulator.objects_dict:
        return position_of(name)
    point = _site(environment, name) + _SHIFTS.get(name, (0.0, 0.0, 0.0))
    return lambda _: point


def _knob_expert(environment: "LiberoEnvironment", stove: str) -> KnobExpert:
    model, data = _compiled(environment)
    joint = model.joint(f"{stove}_button").id
    height, radius = _FIN
    pivot = data.xpos[model.jnt_bodyid[joint]] + np.array([0.0, 0.0, height])
    entry = model.jnt_qposadr[joint]
    # The fin's end is in front where the knob is off.
    return KnobExpert(pivot, lambda: float(data.qpos[entry]), radius)


def _handle_expert(environment: "LiberoEnvironment", drawer: str) -> HandleExpert:
    """Opens the drawer of a region."""
    model, data = _compiled(environment)
    body = model.site_bodyid[model.site(drawer).id]
    pull = -data.xmat[body].reshape(3, 3) @ model.jnt_axis[model.body_jntadr[body]]
    solid = np.flatnonzero((model.geom_bodyid == body) & (model.geom_group == 0))
    bar = solid[np.argmax(data.geom_xpos[solid] @ pull)]
    up = np.array([0.0, 0.0, 1.0])
    inwards = -np.sin(_TILT) * pull - np.cos(_TILT) * up
    along = np.cross(pull, up)
    pose = np.stack([along, np.cross(inwards, along), inwards], axis=1)
    return HandleExpert(lambda: data.geom_xpos[bar].copy(), pull, pose)


def _stow_expert(environment: "LiberoEnvironment", bowl: str, drawer: str) -> StowExpert:
    model, data = _compiled(environment)
    handle = _handle_expert(environment, drawer)
    site = model.site(drawer).id
    entry = model.jnt_qposadr[model.body_jntadr[model.site_bodyid[site]]]
    edge = _site(environment, "wooden_cabinet_1_top_side") @ handle.pull + _TOP

    def place(_: Any) -> "Float64[NpArray, ' 3']":
        """Halfway between the cabinet's edge and the drawer's front."""
        middle = (edge + handle.handle() @ handle.pull - _FRONT) / 2.0
        point = data.site_xpos[site] - np.array([0.0, 0.0, _UNDER])
        return point + (middle - point @ handle.pull) * handle.pull

    rim = BowlExpert(bowl, place, _SIDE_BY_DRAWER, over_cabinet=0.0)
    return StowExpert(handle, rim, lambda: -float(data.qpos[entry]))


def _site(environment: "LiberoEnvironment", name: str) -> "Float64[NpArray, ' 3']":
    model, data = _compiled(environment)
    return data.site_xpos[model.site(name).id].copy()


def _compiled(environment: "LiberoEnvironment") -> tuple[Any, Any]:
    simulation = environment.simulator.sim
    return simulation.model._model, simulation.data._data
