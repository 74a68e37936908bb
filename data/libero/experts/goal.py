"""Experts of LIBERO-Goal, chosen by what a task's definition asks for."""
from typing import TYPE_CHECKING
import numpy as np
from qvla_jax.data.libero.experts.motion import Expert, position_of
from qvla_jax.data.libero.experts.bowl import BowlExpert
from qvla_jax.data.libero.experts.object import grasp_of
from qvla_jax.data.libero.experts.stove import KnobExpert
from qvla_jax.data.libero.experts.plate import PushExpert
from qvla_jax.data.libero.experts.handle import HandleExpert
from qvla_jax.errors import InputError

if TYPE_CHECKING:
    from qvla_jax.data.libero.environment import LiberoEnvironment

import os

def goal_expert(environment: "LiberoEnvironment") -> Expert:
    simulator = environment.simulator
    model, data = simulator.sim.model._model, simulator.sim.data._data
    predicate, item, *where = simulator.parsed_problem["goal_state"][0]
    def site(name):
        return data.site_xpos[model.site(name).id].copy()
    def fixed(point):
        return lambda state: point
    side = np.deg2rad(float(os.environ.get("SIDE", "90")))
    if predicate == "turnon":
        joint = model.joint(item + "_button").id
        body = model.jnt_bodyid[joint]
        pivot = data.xpos[body] + np.array([0, 0, float(os.environ.get('KZ','0.036'))])
        q = model.jnt_qposadr[joint]
        return KnobExpert(pivot, lambda: float(data.qpos[q]), float(os.environ.get('KR','0.036')))
    if predicate == "open":
        return handle_of(environment, item)
    if (predicate, item) == ("on", "plate_1"):
        return PushExpert(item, fixed(site(where[0])))
    if (predicate, item) == ("on", "akita_black_bowl_1"):
        place = where[0]
        if place == "plate_1":
            point = position_of(place)
        elif place == "flat_stove_1_cook_region":
            point = fixed(site(place) + np.array([0, 0, 0.022]))
        else:
            point = fixed(site(place) + np.array([-0.02, 0.02, -0.002]))
        return BowlExpert(item, point, side, over_cabinet=0.0)
    if (predicate, item) == ("on", "cream_cheese_1"):
        return grasp_of(environment, item, position_of(where[0]), clear=0.065, drop=0.065)
    if (predicate, item) == ("on", "wine_bottle_1"):
        if where[0] == "wine_rack_1_top_region":
            point = site(where[0]) + np.array([0, -0.045, 0.035])
        else:
            point = site(where[0]) + np.array([-0.05, 0.02, 0.0])
        return grasp_of(environment, item, fixed(point), clear=0.04, drop=-0.02)
    raise InputError(f"{environment.name}: there is no scripted expert")


def handle_of(environment, region):
    simulator = environment.simulator
    model, data = simulator.sim.model._model, simulator.sim.data._data
    body = model.site_bodyid[model.site(region).id]
    joint = model.body_jntadr[body]
    pull = -data.xmat[body].reshape(3, 3) @ model.jnt_axis[joint]
    geoms = [g for g in range(model.ngeom) if model.geom_bodyid[g] == body and model.geom_group[g] == 0]
    bar = max(geoms, key=lambda g: data.geom_xpos[g] @ pull)
    tilt = np.deg2rad(float(os.environ.get("TILT", "75")))
    inwards = -np.sin(tilt) * pull - np.cos(tilt) * np.array([0, 0, 1.0])
    x = np.array([1.0, 0, 0])
    pose = np.stack([x, np.cross(inwards, x), inwards], axis=1)
    return HandleExpert(lambda: data.geom_xpos[bar].copy(), pull, pose)
