"""A LIBERO task that a policy can act in, by the protocol of OpenVLA-OFT.

    with LiberoEnvironment("libero_spatial", 3) as environment:
        environment.reset(0, seed=0)
        chunk = policy.infer(environment.observe())
        success = any(environment.step(action) for action in chunk)

An episode starts from one of the benchmark's official initial states; ten idle steps let the
objects settle; pictures are rotated by 180 degrees; the gripper of actions follows OpenVLA (1 open,
0 closed) and becomes LIBERO's -1 and +1.

Two things differ from the reference, neither of which changes what the policy sees. Pictures are
rendered on `observe`, not at each step. And the poses of cabinets and stoves, which LIBERO draws on
reset and the initial states do not hold, are drawn from a seed per episode rather than one seed per
run, so an episode does not depend on the episodes before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from qvla_jax.data.libero import suites
from qvla_jax.data.libero.simulator import (
    Cameras,
    Rendering,
    check_state,
    defined_instruction,
    load_suite,
    make_control_env,
    place_fixtures,
)
from qvla_jax.errors import InputError, QvlaError

if TYPE_CHECKING:  # Simulator processes need no JAX, which these annotations import.
    from qvla_jax.array_typing import Float, Float64, Int, NpArray

WAIT_STEPS: Final = 10
# Stands still with an open gripper.
NO_OPERATION: Final = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
# How far (m) a drawn start may be outside the region of the official ones, and the number of tries.
_MARGIN: Final = 0.015
_MAX_DRAWS: Final = 100
# Standard deviation (rad) of the arm's joints at the start of an episode.
_ARM_NOISE: Final = 0.02


@dataclass(frozen=True)
class _Box:
    """Where official initial states have the objects: x and y, entries of the flattened state."""

    entries: np.ndarray
    low: np.ndarray
    high: np.ndarray


class LiberoEnvironment:
    """One task of a suite.

    Attributes:
        suite: the suite's description.
        task: number of the task in the benchmark's order.
        name: LIBERO's name of the task.
        instruction: the task in words, in the benchmark's wording; where a suite changes the
            instruction, in that of the task's definition.
        state: what the simulator observes, by robosuite's names; `reset` and `step` renew it.
        executed: the last action that was executed, in LIBERO's convention.
    """

    def __init__(
        self, suite: str, task: int, *, size: int = 128, rendering: Rendering = "fast"
    ) -> None:
        """Compiles the task's model (a few seconds).

        Args:
            suite: name of the suite, such as "libero_spatial".
            task: number of the task, from 0 on.
            size: height and width of the pictures in pixels.
            rendering: "fast" or "libero", see `qvla_jax.data.libero.simulator`.

        Raises:
            InputError: LIBERO is missing, or has no such suite or task.
        """
        self.suite = suites.get(suite)
        benchmark = load_suite(self.suite)
        if not 0 <= task < benchmark.get_num_tasks():
            raise InputError(
                f"{suite}: tasks run from 0 to {benchmark.get_num_tasks() - 1}, got {task}"
            )
        described = benchmark.get_task(task)
        self.task, self.name = task, str(described.name)
        self.instruction = str(described.language)
        if self.suite.rewords:
            self.instruction = defined_instruction(described.problem_folder, described.bddl_file)
        self._initial_states = np.asarray(benchmark.get_task_init_states(task), np.float64)
        self._env = make_control_env(described.problem_folder, described.bddl_file)
        self._default_fixtures = default_fixtures(self._env)
        self._size = size
        self._rendering: Rendering = rendering
        self._cameras: Cameras | None = None
        self._box: _Box | None = None
        self.state: Mapping[str, Any] = {}
        self.executed = np.zeros(7)

    @property
    def initial_states(self) -> int:
        """Number of official initial states."""
        return len(self._initial_states)

    def reset(self, initial_state: int | None, *, seed: int, wait: int = WAIT_STEPS) -> None:
        """Starts an episode.

        Args:
            initial_state: number of an official initial state; None draws a start from the seed
                that resembles the official ones but is none of them.
            seed: draws what initial states do not hold (poses of fixtures).
            wait: number of idle steps.

        Raises:
            InputError: there is no such initial state.
        """
        if initial_state is None:
            self._draw_start(seed, wait)
            return
        if 0 <= initial_state < self.initial_states:
            self._draw(seed)
            self.restore(self._initial_states[initial_state])
        else:
            raise InputError(
                f"{self.name}: initial states run from 0 to {self.initial_states - 1}, "
                f"got {initial_state}"
            )
        self._settle(wait)

    def restore(self, state: "Float64[NpArray, ' s']") -> None:
        """Puts the simulator into a flattened state; fixtures stay where they are.

        Raises:
            InputError: the state is of another task.
        """
        check_state(self._model, state)
        self.state = self._env.set_init_state(state)

    def observe(self) -> dict[str, Any]:
        """What `Policy.infer` takes: image and wrist_image u8[size, size, 3], state f32[8]."""
        return {
            "image": self.render("image"),
            "wrist_image": self.render("wrist_image"),
            "state": proprio(self.state),
            "instruction": self.instruction,
        }

    def render(self, camera: str) -> np.ndarray:
        """Renders "image" or "wrist_image"."""
        if self._cameras is None:
            self._cameras = Cameras(self._env.sim, size=self._size, rendering=self._rendering)
        return self._cameras.render(camera)

    def step(self, action: "Float[NpArray, ' a']") -> bool:
        """Executes one metric action of a policy (gripper: 1 open, 0 closed).

        Returns:
            Whether the task is done.
        """
        return self.step_raw(libero_action(action))

    def step_raw(self, action: "Float[NpArray, ' a']") -> bool:
        """Executes one action in LIBERO's own convention (gripper: -1 open, +1 close)."""
        self.executed = np.asarray(action, np.float64)
        self.state, _, done, _ = self._env.step(self.executed.tolist())
        return bool(done)

    def joints(self) -> "Float[NpArray, ' 7']":
        """Angles of the arm's joints in rad, float32."""
        return np.asarray(self.state["robot0_joint_pos"], np.float32)

    def flattened(self) -> "Float64[NpArray, ' s']":
        """The simulator's state (time, positions, velocities), which `restore` takes."""
        return np.asarray(self._env.get_sim_state(), np.float64)

    def fixtures(self) -> dict[str, "Float64[NpArray, ' 7']"]:
        """Poses (position, quaternion w first) of cabinets, stoves and the like, by body."""
        poses = {}
        for name in self._default_fixtures:
            body = self._model.body(name).id
            poses[name] = np.concatenate([self._model.body_pos[body], self._model.body_quat[body]])
        return poses

    @property
    def simulator(self) -> Any:
        """The environment of robosuite for this task, for privileged information."""
        return self._env.env

    @property
    def _model(self) -> Any:
        return self._env.sim.model._model

    def _draw(self, seed: int) -> None:
        # LIBERO draws some poses relative to fixtures where the model has them at first ("in the
        # top drawer"). Its own resets recompile the model for that, which takes seconds and also
        # makes a new gripper; otherwise the old gripper's last command would leak into this
        # episode.
        place_fixtures(self._model, self._default_fixtures)
        for robot in self._env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._env.seed(seed)
        self.state = self._env.reset()

    def _settle(self, wait: int) -> None:
        for _ in range(wait):
            self.state = self._env.step(list(NO_OPERATION))[0]

    def _draw_start(self, seed: int, wait: int) -> None:
        """Draws objects, fixtures and the arm, distributed as in official episodes.

        Objects and fixtures come from one draw each; angles of the arm's joints are normally
        distributed about its home position, robosuite's default, which LIBERO's own resets omit. In
        some draws objects interpenetrate and are thrown out; draws outside the region of the
        official initial states are repeated.
        """
        box = self._official_box()
        for draw in range(_MAX_DRAWS):
            first, second = np.random.SeedSequence([seed, draw]).generate_state(2) >> 1
            self._draw(int(first))
            start = self.flattened()
            start[self._arm] += np.random.default_rng([seed, draw]).normal(0.0, _ARM_NOISE, 7)
            self._draw(int(second))
            self.restore(start)
            self._settle(wait)
            state = self.flattened()[box.entries]
            if (state >= box.low).all() and (state <= box.high).all():
                return
        raise QvlaError(f"{self.name}: seed {seed} gives no start within {_MAX_DRAWS} draws")

    @property
    def _arm(self) -> "Int[NpArray, ' 7']":
        """Where the flattened state has the angles of the arm's joints."""
        joints = [self._model.joint(name).id for name in self._env.robots[0].robot_joints]
        return 1 + self._model.jnt_qposadr[joints]  # The state starts with the time.

    def _official_box(self) -> "_Box":
        if self._box is None:
            objects = self.simulator.objects_dict.values()
            joints = [self._model.joint(item.joints[-1]).id for item in objects]
            first = 1 + self._model.jnt_qposadr[joints]  # The state starts with the time.
            entries = np.concatenate([first, first + 1])
            official = self._initial_states[:, entries]
            self._box = _Box(
                entries, official.min(axis=0) - _MARGIN, official.max(axis=0) + _MARGIN
            )
        return self._box

    def close(self) -> None:
        """Frees the OpenGL context and the simulation."""
        if self._cameras is not None:
            self._cameras.close()
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def libero_action(action: "Float[NpArray, ' a']") -> "Float[NpArray, ' a']":
    """A policy's metric action in LIBERO's convention, as OpenVLA-OFT converts it.

    The gripper entry in [0, 1] (1 open) becomes -1 (open) or +1 (close).
    """
    converted = np.array(action, np.float64)
    converted[-1] = -np.sign(2.0 * converted[-1] - 1.0)
    return converted


def policy_action(action: "Float[NpArray, ' a']") -> "Float[NpArray, ' a']":
    """The inverse of `libero_action`, for a gripper that is -1, 0 or +1."""
    converted = np.array(action, np.float64)
    converted[-1] = (1.0 - converted[-1]) / 2.0
    return converted


def proprio(state: Mapping[str, Any]) -> "Float[NpArray, ' 8']":
    """Gripper position (m), its axis-angle (rad) and both finger positions (m), float32."""
    parts = (
        state["robot0_eef_pos"],
        axis_angle(state["robot0_eef_quat"]),
        state["robot0_gripper_qpos"],
    )
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quaternion: "Float[NpArray, ' 4']") -> "Float64[NpArray, ' 3']":
    """Axis times angle of a quaternion with w last, as robosuite defines it."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * 2.0 * np.arccos(w) / sine


def default_fixtures(env: Any) -> dict[str, "Float64[NpArray, ' 7']"]:
    """Poses of the fixtures in the task's model file, before any reset."""
    bodies = {body.get("name"): body for body in env.env.model.worldbody.iter("body")}
    poses = {}
    for fixture in env.env.fixtures_dict.values():
        body = bodies.get(getattr(fixture, "root_body", None))
        if body is None:
            continue
        position = np.fromstring(body.get("pos", "0 0 0"), sep=" ")
        quaternion = np.fromstring(body.get("quat", "1 0 0 0"), sep=" ")
        poses[str(body.get("name"))] = np.concatenate([position, quaternion])
    return poses
