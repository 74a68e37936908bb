"""Scripted experts for LIBERO-Spatial, -Object and -Goal, from the simulator's state.

They are memoryless: an action depends only on the current state, so they can label any state that a
learner visits. The phase (reach, close, carry, release) follows from the fingers and the distances.
Motion is a funnel: the target height rises with the horizontal distance from the target, and
sideways motion waits until the gripper is nearly that high, so nothing on the way is knocked over.
Gains are proportional and saturate.

Actions are LIBERO's: changes of position and rotation of the operational-space controller, in
[-1, 1] (0.05 m and 0.5 rad each), and the gripper (-1 open, +1 close).

    expert = make_expert(environment)
    action = expert(environment.state)
"""

from typing import TYPE_CHECKING

from qvla_jax.data.libero.experts.bowl import bowl_expert
from qvla_jax.data.libero.experts.goal import goal_expert
from qvla_jax.data.libero.experts.motion import Expert, SmoothNoise
from qvla_jax.data.libero.experts.object import object_expert
from qvla_jax.errors import InputError

if TYPE_CHECKING:
    from qvla_jax.data.libero.environment import LiberoEnvironment

__all__ = ["Expert", "SmoothNoise", "make_expert"]


def make_expert(environment: "LiberoEnvironment") -> Expert:
    """The expert of a task for the current episode; call this again after a reset.

    Raises:
        InputError: there is no expert for the suite.
    """
    suite = environment.suite.name
    if suite == "libero_spatial":
        return bowl_expert(environment)
    if suite == "libero_object":
        return object_expert(environment)
    if suite == "libero_goal":
        return goal_expert(environment)
    raise InputError(
        f"{suite}: there is no scripted expert; there is one for libero_spatial, "
        "libero_object and libero_goal"
    )
