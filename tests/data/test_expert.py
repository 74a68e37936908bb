"""The scripted expert on a point-mass gripper: its phases, and that it needs no memory."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qvla_jax.data.libero.experts import motion, object
from qvla_jax.data.libero.experts.bowl import BowlExpert
from qvla_jax.data.libero.experts.motion import SmoothNoise, position_of
from qvla_jax.data.libero.experts.object import ObjectExpert

DOWN = Rotation.from_matrix(np.diag([1.0, -1.0, -1.0]))


class Table:
    """A gripper that follows its commands, and a bowl that follows closed fingers."""

    def __init__(self, rng, *, offset=0.0535, lift=0.037):
        self.gripper = np.array([-0.2, 0.0, 1.17]) + rng.uniform(-0.05, 0.05, 3)
        self.turn = Rotation.from_rotvec(rng.uniform(-0.2, 0.2, 3)) * DOWN
        self.opening = 0.08
        self.item = np.append(rng.uniform(-0.1, 0.1, 2), 0.9)
        # Never on the item: at least 13 cm away in y, farther than the cabinet's region.
        self.goal = np.array([rng.uniform(-0.1, 0.1), self.item[1] + 0.25, 0.9])
        self.offset, self.lift = offset, lift
        self.hold = None

    def state(self):
        speed = 0.0 if self.opening in (0.004, 0.08) else 0.5
        return {
            "robot0_eef_pos": self.gripper,
            "robot0_eef_quat": self.turn.as_quat(),
            "robot0_gripper_qpos": np.array([self.opening, -self.opening]) / 2,
            "robot0_gripper_qvel": np.array([speed, -speed]),
            "bowl_pos": self.item,
            "bowl_quat": np.array([0.0, 0, 0, 1]),
            "plate_pos": self.goal,
            "plate_quat": np.array([0.0, 0, 0, 1]),
        }

    def step(self, action):
        assert np.abs(action).max() <= 1
        self.gripper = self.gripper + 0.05 * action[:3] * 0.5
        self.turn = Rotation.from_rotvec(0.5 * action[3:6] * 0.5) * self.turn
        self.opening = float(np.clip(self.opening - 0.02 * action[6], 0.004, 0.08))
        closed = self.opening <= 0.004
        if closed and self.hold is None and self.reachable():
            self.hold = self.item - self.gripper
        if not closed:
            self.hold = None
        if self.hold is not None:
            self.item = self.gripper + self.hold
        elif self.item[2] > 0.9:
            self.item = np.append(self.item[:2], max(0.9, self.item[2] - 0.02))

    def reachable(self):
        away = self.gripper - self.item
        return abs(np.hypot(*away[:2]) - self.offset) < 0.02 and abs(away[2] - self.lift) < 0.02


def run(table, actor, steps=300):
    phases = []
    for _ in range(steps):
        action = actor(table.state())
        if not phases or phases[-1] != actor.phase:
            phases.append(actor.phase)
        table.step(action)
    return phases


@pytest.mark.parametrize("seed", range(8))
def test_bowl_ends_on_the_plate(seed):
    rng = np.random.default_rng(seed)
    table = Table(rng)
    phases = run(table, BowlExpert("bowl", position_of("plate"), side=rng.uniform(-np.pi, np.pi)))
    assert np.hypot(*(table.item - table.goal)[:2]) < 0.03
    assert table.hold is None
    assert phases == ["reach", "close", "carry", "release"]


@pytest.mark.parametrize("seed", range(4))
def test_object_ends_in_the_basket(seed):
    table = Table(np.random.default_rng(seed), offset=0.0, lift=0.02)
    actor = ObjectExpert(
        item="bowl",
        place=position_of("plate"),
        side=np.pi / 2,
        offset=np.array([0.0, 0, 0.02]),
        bottom=-0.03,
        is_held=lambda: table.hold is not None,
        clear=0.18,
        drop=0.18,
    )
    phases = run(table, actor)
    assert np.hypot(*(table.item - table.goal)[:2]) < 0.06
    assert phases == ["reach", "close", "carry", "release"]


def test_it_is_a_function_of_the_state_alone():
    rng = np.random.default_rng(0)
    table = Table(rng)
    used, labels, states = BowlExpert("bowl", position_of("plate"), side=1.0), [], []
    for _ in range(120):
        states.append(table.state())
        labels.append(used(states[-1]))
        table.step(labels[-1])
    for index in rng.permutation(120):
        fresh = BowlExpert("bowl", position_of("plate"), side=1.0)
        np.testing.assert_array_equal(fresh(states[index]), labels[index])


def test_it_recovers_from_a_dropped_bowl():
    table = Table(np.random.default_rng(3))
    actor = BowlExpert("bowl", position_of("plate"), side=0.5)
    while actor.phase != "carry":
        table.step(actor(table.state()))
    table.opening, table.hold = 0.08, None
    run(table, actor)
    assert np.hypot(*(table.item - table.goal)[:2]) < 0.03


def test_fingers_take_the_shorter_turn():
    for side in np.linspace(-np.pi, np.pi, 41):
        turn = motion.turn_to({"robot0_eef_quat": DOWN.as_quat()}, side)
        assert np.abs(turn[:2]).max() < 1e-9
        assert abs(turn[2]) <= np.pi / 2 + 1e-6
        # Afterwards the finger axis (y of the gripper) is parallel to the side.
        axis = (Rotation.from_rotvec(turn) * DOWN).apply([0, 1, 0])
        assert abs(axis @ [np.cos(side), np.sin(side), 0]) == pytest.approx(1)


def test_rotations_match_scipy():
    for vector in np.random.default_rng(0).uniform(-1.5, 1.5, (20, 3)):
        rotation = Rotation.from_rotvec(vector)
        np.testing.assert_allclose(
            motion.rotation_matrix(rotation.as_quat()), rotation.as_matrix(), atol=1e-12
        )
        np.testing.assert_allclose(motion.rotation_vector(rotation.as_matrix()), vector, atol=1e-9)


def test_noise_has_its_strength_and_correlation():
    noise = SmoothNoise(np.random.default_rng(0), 0.1)
    clean = np.array([0.0, 0, 0, 0, 0, 0, 1])
    drawn = np.array([noise(clean, "reach") for _ in range(20000)])
    assert clean.tolist() == [0, 0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(drawn[:, :6].std(axis=0), [0.1] * 3 + [0.025] * 3, rtol=0.1)
    correlation = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]
    assert correlation == pytest.approx(0.9, abs=0.02)
    assert (drawn[:, 6] == 1).all()
    quiet = np.array([noise(clean, "close") for _ in range(20000)])
    np.testing.assert_allclose(quiet[:, 0].std(), 0.025, rtol=0.15)
    assert np.abs(SmoothNoise(np.random.default_rng(0), 5.0)(clean, "reach")).max() <= 1


def test_objects_are_grasped_across_a_side_that_fits_and_is_free():
    def side(points, *others, top=0.02):
        solids = [
            np.concatenate([np.column_stack([other, np.full(4, z)]) for z in (0.0, top)])
            for other in others
        ]
        return round(np.rad2deg(object.free_side(points, solids, grasp=0.01)))

    corners = np.array([[x, y] for x in (-0.02, 0.02) for y in (-0.06, 0.06)])
    turned = corners @ Rotation.from_euler("z", 30, degrees=True).as_matrix()[:2, :2].T
    assert side(corners[:, ::-1]) == 90  # Along y, the default, where it fits.
    assert side(turned) == 30
    assert side(np.array([[x, y] for x in (-0.04, 0.04) for y in (-0.06, 0.06)])) == 0
    # A neighbour where a finger would come down: across another side that fits.
    box = np.array([[x, y] for x in (-0.02, 0.02) for y in (-0.02, 0.02)])
    assert side(box, box + np.array([0.2, 0])) == 90
    blocked = side(box, box + np.array([0, 0.08]))
    assert blocked != 90
    finger = object._FINGER * np.array([np.cos(np.deg2rad(blocked)), np.sin(np.deg2rad(blocked))])
    assert abs(finger[1]) < 0.06 - object._FREE + 1e-9
    # Farther off, beyond the fingers, only a tall one is in the way: of the hand.
    behind = box + np.array([0, 0.1])
    assert side(box, behind) == 90
    assert side(box, behind, top=0.08) != 90
