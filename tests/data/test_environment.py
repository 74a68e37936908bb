"""LIBERO's conventions; and, where the simulator is installed, short episodes in it."""

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qvla_jax.data.libero import environment, suites
from qvla_jax.data.libero.environment import axis_angle, default_fixtures, libero_action, proprio
from qvla_jax.data.libero.simulator import unattended
from qvla_jax.data.open_x.encodings import GRIPPERS
from qvla_jax.errors import InputError


def test_an_import_that_asks_a_question_gets_an_answer(capsys):
    def importing():
        print("Do you want to specify a custom path?")
        raise RuntimeError(input("(Y/N): "))

    ask = input
    with pytest.raises(RuntimeError, match=r"^n$"), unattended():
        importing()
    assert input is ask
    assert capsys.readouterr().out == ""


def test_step_limits_are_those_of_the_reference() -> None:
    every = suites.SUITES.values()
    limits = {suite.name: suite.max_steps for suite in every if suite.base is None}
    assert limits == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    assert all(suite.max_steps == limits[suite.base] for suite in every if suite.base is not None)
    with pytest.raises(InputError, match="did you mean libero_goal"):
        suites.get("libero_goals")


def test_gripper_undoes_the_standardization_of_training_labels() -> None:
    raw = np.random.default_rng(0).uniform(-1, 1, (20, 7)).astype(np.float32)
    raw[:, 6] = np.sign(raw[:, 6])
    standard = raw.copy()
    standard[:, 6] = GRIPPERS["closed_signed"](raw[:, 6])
    for action, label in zip(raw, standard, strict=True):
        np.testing.assert_allclose(libero_action(label), action)


def test_gripper_is_binary_and_the_source_untouched() -> None:
    action = np.array([0.1, 0, 0, 0, 0, 0, 0.7], np.float32)
    assert libero_action(action)[-1] == -1  # More open than closed.
    action[-1] = -0.2  # A network may leave [0, 1].
    assert libero_action(action)[-1] == 1
    assert action[-1] == np.float32(-0.2)


def test_axis_angle_matches_scipy() -> None:
    quaternions = np.random.default_rng(0).normal(size=(50, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    for quaternion in quaternions:
        # The reference does not choose the shorter way round, so compare rotations.
        ours = Rotation.from_rotvec(axis_angle(quaternion))
        assert (ours * Rotation.from_quat(quaternion).inv()).magnitude() < 1e-7
        assert np.linalg.norm(axis_angle(quaternion)) == pytest.approx(2 * np.arccos(quaternion[3]))
    assert axis_angle(np.array([0, 0, 0, 1.0 + 1e-12])).tolist() == [0, 0, 0]


def test_proprio_order() -> None:
    state = {
        "robot0_eef_pos": np.array([1.0, 2, 3]),
        "robot0_eef_quat": np.array([1.0, 0, 0, 0]),
        "robot0_gripper_qpos": np.array([0.04, -0.03]),
    }
    expected = np.float32([1, 2, 3, np.pi, 0, 0, 0.04, -0.03])
    np.testing.assert_array_equal(proprio(state), expected)
    assert proprio(state).dtype == np.float32


def test_default_fixture_poses_come_from_the_model_file() -> None:
    world = ElementTree.fromstring(
        "<worldbody><body name='shelf' pos='1 2 3' quat='0 1 0 0'><body name='door'/></body>"
        "<body name='stove'/><body name='bowl' pos='9 9 9'/></worldbody>"
    )
    fixtures = {
        "shelf_1": SimpleNamespace(root_body="shelf"),
        "stove_1": SimpleNamespace(root_body="stove"),
        "table": SimpleNamespace(),
    }
    env = SimpleNamespace(
        env=SimpleNamespace(model=SimpleNamespace(worldbody=world), fixtures_dict=fixtures)
    )
    poses = {name: pose.tolist() for name, pose in default_fixtures(env).items()}
    assert poses == {"shelf": [1, 2, 3, 0, 1, 0, 0], "stove": [0, 0, 0, 1, 0, 0, 0]}


def test_environment_loads_without_jax() -> None:
    code = f"import sys, {environment.__name__}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# In a process of its own: Mesa crashes where other tests have loaded TensorFlow.
PROGRAM = """
import json, os, sys
os.environ.setdefault("MUJOCO_GL", "egl")
import mujoco
import numpy as np
try:
    mujoco.GLContext(8, 8).free()
except Exception as error:
    print(f"no OpenGL context here: {error}")
    sys.exit(77)
from qvla_jax.data.libero.environment import LiberoEnvironment
from qvla_jax.errors import InputError

actions = np.random.default_rng(0).uniform(-1, 1, (12, 7))

def rollout(state, seed):
    environment.reset(state, seed=seed)
    start, fixtures = environment.flattened(), environment.fixtures()
    for action in actions:
        environment.step(action)
    return start, fixtures, environment.flattened()

def arms(states):
    found = []
    for number, state in enumerate(states):
        environment.reset(state, seed=number, wait=0)
        found.append(environment.joints())
    return np.stack(found)

with LiberoEnvironment("libero_spatial", 4) as environment:
    one = rollout(3, 7)
    other = rollout(5, 1)
    again = rollout(3, 7)
    seen = environment.observe()
    try:
        environment.reset(50, seed=0)
    except InputError as error:
        message = str(error)
    official, drawn = arms(range(50)), arms([None] * 20)
    out = {
        "arm_mean": float(np.abs(drawn.mean(0) - official.mean(0)).max()),
        "arm_joints": float((drawn - drawn.mean(0)).std() / (official - official.mean(0)).std()),
        "same": all(np.array_equal(a, b) for a, b in zip(one[::2], again[::2])),
        "fixtures_same": all(np.array_equal(one[1][k], again[1][k]) for k in one[1]),
        "fixtures_other": any(not np.array_equal(one[1][k], other[1][k]) for k in one[1]),
        "other": bool(np.abs(one[0] - other[0]).max() > 1e-3),
        "instruction": seen["instruction"],
        "shapes": [seen["image"].shape, seen["wrist_image"].shape, seen["state"].shape],
        "spread": [float(seen["image"].std()), float(seen["wrist_image"].std())],
        "message": message,
    }
with LiberoEnvironment("libero_spatial_lan", 4) as environment:
    environment.reset(3, seed=7)
    out["reworded"] = [environment.name, environment.instruction]
with open(sys.argv[1], "w") as file:
    json.dump(out, file)
"""


@pytest.mark.libero
@pytest.mark.slow
def test_short_episodes_repeat_exactly_whatever_ran_between(tmp_path: Path) -> None:
    for name in ("mujoco", "libero"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the LIBERO simulator (extra `libero`)")
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(out)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["same"]
    assert found["fixtures_same"]
    assert found["fixtures_other"]
    assert found["other"]
    assert found["instruction"].startswith("pick up the black bowl in the top drawer")
    assert found["shapes"] == [[128, 128, 3], [128, 128, 3], [8]]
    assert min(found["spread"]) > 10
    # Drawn starts have the arm where official ones have it, and spread as much.
    assert found["arm_mean"] < 0.02
    assert 0.8 < found["arm_joints"] < 1.2
    assert "initial states run from 0 to 49, got 50" in found["message"]
    name, instruction = found["reworded"]
    assert name.startswith("pick_up_the_black_bowl_in_the_top_drawer")
    assert instruction == "take the black bowl from the top drawer and put it on plate"
