"""Experts of LIBERO-Goal in kinematic worlds, and, where the simulator is installed, in it."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qvla_jax.data.libero.experts import make_expert
from qvla_jax.data.libero.experts.bowl import BowlExpert
from qvla_jax.data.libero.experts.drawer import HandleExpert, StowExpert
from qvla_jax.data.libero.experts.stove import KnobExpert
from qvla_jax.errors import InputError

from .test_expert import DOWN, Table, run

PULL = np.array([0.0, 1.0, 0.0])
# Nearly horizontal, against the pull.
POSE = (Rotation.from_rotvec([np.deg2rad(-75), 0, 0]) * DOWN).as_matrix()


class Drawer(Table):
    """A drawer whose handle follows closed fingers along y; its front is 2 cm behind the handle."""

    def __init__(self, rng):
        super().__init__(rng)
        self.closed, self.extent = np.array([0.2, -0.13, 1.05]), 0.0
        self.rate = 0.0

    def state(self):
        return {**super().state(), "robot0_gripper_qvel": np.array([self.rate, -self.rate])}

    def handle(self):
        return self.closed + self.extent * PULL

    def step(self, action):
        before, was_held, opening = self.gripper, self.pulled, self.opening
        super().step(action)
        if was_held and self.pulled:
            self.extent = float(np.clip(self.extent + (self.gripper - before)[1], 0.0, 0.16))
        if self.on_bar:
            self.opening = max(self.opening, 0.016)
        self.rate = (self.opening - opening) / 2 / 0.05

    @property
    def on_bar(self):
        return np.linalg.norm(self.gripper - self.handle()) < 0.03

    @property
    def pulled(self):
        return self.on_bar and self.opening <= 0.016


def handle_expert(world):
    return HandleExpert(world.handle, PULL, POSE)


@pytest.mark.parametrize("seed", range(4))
def test_drawer_is_pulled_open(seed):
    world = Drawer(np.random.default_rng(seed))
    actor = handle_expert(world)
    phases = []
    while world.extent < 0.14 and len(phases) < 200:
        phases += run(world, actor, steps=1)
    assert [k for k, _ in itertools.groupby(phases)] == ["reach", "close", "carry"]
    # The fingers point at the handle as they close.
    assert (world.turn.inv() * Rotation.from_matrix(POSE)).magnitude() < 0.25


def test_bowl_goes_into_the_drawer_once_it_is_open():
    world = Drawer(np.random.default_rng(1))
    world.item = np.array([0.0, 0.1, 0.9])

    def inside(_):
        return world.handle() + np.array([0.0, -0.09, -0.05])

    bowl = BowlExpert("bowl", inside, np.pi, over_cabinet=0.0)
    actor = StowExpert(handle_expert(world), bowl, lambda: world.extent)
    phases = []
    while np.linalg.norm(world.item - inside(None)) > 0.02 and len(phases) < 400:
        phases += run(world, actor, steps=1)
    assert [k for k, _ in itertools.groupby(phases)] == [
        *("reach", "close", "carry", "release"),  # the drawer
        *("reach", "close", "carry"),  # the bowl
    ]
    assert 0.1 < world.extent < 0.13


class Knob(Table):
    """A knob whose fin turns when the finger at smaller y pushes its end."""

    pivot = np.array([-0.4, 0.2, 0.95])

    def __init__(self, rng):
        super().__init__(rng)
        self.angle = 0.0

    def step(self, action):
        super().step(action)
        along, across = (self.gripper - self.pivot)[:2]
        low = abs(self.gripper[2] - self.pivot[2]) < 0.02
        if low and abs(along - 0.03) < 0.03 and across - 0.04 > along * np.tan(self.angle) - 0.012:
            self.angle = float(np.arctan2(across - 0.028, max(along, 0.01)))


@pytest.mark.parametrize("seed", range(4))
def test_knob_is_turned(seed):
    world = Knob(np.random.default_rng(seed))
    actor = KnobExpert(world.pivot, lambda: world.angle, 0.036)
    assert run(world, actor, steps=150)[:2] == ["reach", "carry"]
    assert world.angle > 0.5


def test_tasks_without_an_expert_are_refused_by_name():
    def environment(suite, goal):
        simulator = SimpleNamespace(parsed_problem={"goal_state": [goal]})
        return SimpleNamespace(
            suite=SimpleNamespace(name=suite), name="some_task", task=0, simulator=simulator
        )

    with pytest.raises(InputError, match=r"some_task: .* no scripted expert"):
        make_expert(environment("libero_goal", ["on", "plate_1", "main_table_stove_front_region"]))
    with pytest.raises(InputError, match=r"libero_10: .* libero_goal"):
        make_expert(environment("libero_10", []))


# In a process of its own: Mesa crashes where other tests have loaded TensorFlow.
PROGRAM = """
import json, sys
from qvla_jax.data.libero.environment import LiberoEnvironment
from qvla_jax.data.libero.experts import make_expert

steps = {}
for task in (0, 7):
    with LiberoEnvironment("libero_goal", task) as environment:
        environment.reset(0, seed=0)
        expert = make_expert(environment)
        for step in range(1, 301):
            if environment.step_raw(expert(environment.state)):
                steps[environment.name] = step
                break
with open(sys.argv[1], "w") as file:
    json.dump(steps, file)
"""


@pytest.mark.libero
@pytest.mark.slow
def test_drawer_and_stove_of_the_simulator(tmp_path: Path):
    for name in ("mujoco", "libero"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the LIBERO simulator (extra `libero`)")
    out = tmp_path / "steps.json"
    subprocess.run([sys.executable, "-c", PROGRAM, str(out)], capture_output=True, check=True)
    steps = json.loads(out.read_text())
    assert set(steps) == {"open_the_middle_drawer_of_the_cabinet", "turn_on_the_stove"}
