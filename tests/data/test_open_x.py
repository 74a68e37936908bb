"""Specifications of the public data sets, against synthetic sets of their structure.

The expected actions are the public transforms, written out here feature by feature without what the
specifications are made of.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from qvla_jax import data
from qvla_jax.data import open_x
from qvla_jax.data.open_x import encodings
from qvla_jax.data.open_x.columns import Entries
from qvla_jax.errors import DatasetError, InputError

if importlib.util.find_spec("tensorflow") is None:  # importing it takes seconds of every worker
    pytest.skip("writing RLDS needs TensorFlow (extra `rlds`)", allow_module_level=True)

from . import open_x_sets as sets

# TensorFlow and Beam warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")

Columns = Mapping[str, np.ndarray]


# What the public code does to grippers, step by step.


def absolute(commands: np.ndarray) -> np.ndarray:
    """+1 closes, -1 opens, 0 keeps; the first command changes something."""
    signs = [-1 if c > 0.1 else 1 if c < -0.1 else 0 for c in commands.ravel()]
    state = next((-sign for sign in signs if sign), 1)
    result = []
    for sign in signs:
        state = sign or state
        result.append([(state + 1) / 2])
    return np.asarray(result)


def binary(gripper: np.ndarray) -> np.ndarray:
    """Between open and closed, what comes after; at the end the last value."""
    carry, result = float(gripper.ravel()[-1]), []
    for value in gripper.ravel()[::-1]:
        carry = 1.0 if value > 0.95 else 0.0 if value < 0.05 else carry
        result.append([carry])
    return np.asarray(result[::-1])


def clip_inverted(gripper: np.ndarray) -> np.ndarray:
    return 1 - np.clip(gripper, 0, 1)


def parts(c: Columns, gripper: np.ndarray) -> list[np.ndarray]:
    return [c["action/world_vector"], c["action/rotation_delta"], gripper.reshape(-1, 1)]


def euler(quaternions: np.ndarray) -> np.ndarray:
    x, y, z, w = quaternions.astype(np.float64).T
    return np.stack(
        [
            np.arctan2(2 * (w * x + y * z), 1 - 2 * (x**2 + y**2)),
            np.arcsin(np.clip(2 * (w * y - x * z), -1, 1)),
            np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2)),
        ],
        axis=1,
    )


def bridge(c: Columns, gripper: np.ndarray) -> list[np.ndarray]:
    state = c["observation/state"][1:].astype(np.float64)
    return [state[1:, :6] - state[:-1, :6], gripper[:-1]]


def zeros(columns: int, like: np.ndarray) -> np.ndarray:
    return np.zeros((len(like), columns))


def closed_last(c: Columns) -> list[np.ndarray]:
    return [c["action"][:, :6], 1 - c["action"][:, -1:]]


def signed_last(c: Columns) -> list[np.ndarray]:
    return [c["action"][:, :6], clip_inverted(c["action"][:, -1:])]


def as_stored(c: Columns) -> list[np.ndarray]:
    return [c["action"][:, :7]]


def google(c: Columns) -> list[np.ndarray]:
    return parts(c, absolute(c["action/gripper_closedness_action"]))


PUBLIC: dict[str, Callable[[Columns], list[np.ndarray]]] = {
    "fractal20220817_data": google,
    "kuka": google,
    "bc_z": lambda c: [
        c["action/future/xyz_residual"][:, :3],
        c["action/future/axis_angle_residual"][:, :3],
        1 - c["action/future/target_close"][:, :1],
    ],
    "language_table": lambda c: [c["action"], zeros(4, c["action"]), zeros(1, c["action"]) + 1],
    "bridge_orig": lambda c: bridge(c, binary(c["action"][1:, -1:])),
    "bridge": lambda c: bridge(c, c["action/open_gripper"][1:, None]),
    "taco_play": lambda c: [
        c["action/rel_actions_world"][:, :6],
        np.clip(c["action/rel_actions_world"][:, -1:], 0, 1),
    ],
    "jaco_play": lambda c: [
        c["action/world_vector"],
        zeros(3, c["action/world_vector"]),
        absolute(c["action/gripper_closedness_action"]),
    ],
    "berkeley_cable_routing": lambda c: parts(c, zeros(1, c["action/world_vector"])),
    "roboturk": lambda c: parts(c, clip_inverted(c["action/gripper_closedness_action"])),
    "viola": lambda c: parts(c, clip_inverted(c["action/gripper_closedness_action"])),
    "berkeley_autolab_ur5": google,
    "toto": lambda c: parts(c, c["action/open_gripper"]),
    "stanford_hydra_dataset_converted_externally_to_rlds": closed_last,
    "austin_buds_dataset_converted_externally_to_rlds": signed_last,
    "nyu_franka_play_dataset_converted_externally_to_rlds": lambda c: [
        c["action"][:, 7:13],
        np.clip(c["action"][:, 13:14], 0, 1),
    ],
    "furniture_bench_dataset_converted_externally_to_rlds": lambda c: [
        c["action"][:, :3],
        euler(c["action"][:, 3:7]),
        clip_inverted(c["action"][:, 7:]),
    ],
    "ucsd_kitchen_dataset_converted_externally_to_rlds": as_stored,
    "austin_sailor_dataset_converted_externally_to_rlds": signed_last,
    "austin_sirius_dataset_converted_externally_to_rlds": signed_last,
    "dlr_edan_shared_control_converted_externally_to_rlds": closed_last,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": lambda c: [
        c["action"][:, :3],
        euler(c["action"][:, 3:7]),
        c["action"][:, 7:],
    ],
    "utaustin_mutex": signed_last,
    "berkeley_fanuc_manipulation": lambda c: [c["action"], 1 - c["observation/state"][:, 6:7]],
    "cmu_stretch": as_stored,
    "fmb_dataset": as_stored,
    "dobbe": as_stored,
    "droid": lambda c: [
        c["action_dict/cartesian_velocity"],
        1 - c["action_dict/gripper_position"],
    ],
    "libero": signed_last,
}
QUATERNIONS = (
    "furniture_bench_dataset_converted_externally_to_rlds",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
)
# Numbers of proprio, padding included; 0: none.
PROPRIO = {name: 8 for name in PUBLIC} | {"roboturk": 0, "dobbe": 7, "droid": 7}
# Sets with a camera at the gripper beside the main one.
WRIST = {
    "austin_buds_dataset_converted_externally_to_rlds",
    "austin_sailor_dataset_converted_externally_to_rlds",
    "austin_sirius_dataset_converted_externally_to_rlds",
    "berkeley_autolab_ur5",
    "berkeley_cable_routing",
    "berkeley_fanuc_manipulation",
    "droid",
    "fmb_dataset",
    "furniture_bench_dataset_converted_externally_to_rlds",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
    "jaco_play",
    "libero",
    "stanford_hydra_dataset_converted_externally_to_rlds",
    "taco_play",
    "utaustin_mutex",
    "viola",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list]]:
    turns = Rotation.random(5, random_state=np.random.RandomState(0)).as_quat()
    ends = np.random.default_rng(0).uniform(0, 1, (5, 4))
    action = np.concatenate([ends[:, :3], turns, ends[:, 3:]], axis=1)

    def write(name: str) -> tuple[Path, list]:
        changes = {"action": action} if name in QUATERNIONS else {}
        return sets.write(tmp_path_factory.mktemp("sets"), name, changes=changes)

    return cache(write)


def test_every_spec_is_tested() -> None:
    assert set(sets.STRUCTURES) == set(PUBLIC) == set(open_x.SPECS)


@pytest.mark.parametrize("name", list(PUBLIC))
def test_a_set_is_read_as_the_public_code_reads_it(
    name: str, written: Callable[[str], tuple[Path, list]]
) -> None:
    folder, columns = written(name)
    dataset = data.RldsDataset(folder)
    assert dataset.spec is open_x.SPECS[name]
    episodes = list(dataset.episodes())
    assert len(episodes) == len(columns) == 2
    for number, (episode, stored) in enumerate(zip(episodes, columns, strict=True)):
        expected = np.concatenate(PUBLIC[name](stored), axis=1).astype(np.float32)
        np.testing.assert_allclose(episode.action, expected, rtol=1e-6, atol=1e-7)
        assert episode.action.dtype == np.float32
        assert episode.action.shape == (len(episode), 7)
        gripper = episode.action[:, 6]
        assert ((gripper >= 0) & (gripper <= 1)).all()
        assert episode.instruction == f"pick up object {number}"
        first = 1 if name.startswith("bridge") else 0
        pictures = stored[dataset.spec.image][first : first + len(episode)]
        np.testing.assert_array_equal(episode.image, pictures)
        assert (episode.wrist_image is not None) == (name in WRIST)
        assert (0 if episode.state is None else episode.state.shape[1]) == PROPRIO[name]


@pytest.mark.parametrize("name", ["kuka", "droid"])
def test_either_file_format_reads_the_same(
    name: str, written: Callable[[str], tuple[Path, list]], tmp_path: Path
) -> None:
    """Open-X is published as TFRecord; kuka's tensors are compressed."""
    folder, _ = sets.write(tmp_path, name, file_format="tfrecord")
    one, other = (data.RldsDataset(path).episodes() for path in (written(name)[0], folder))
    for a, b in zip(one, other, strict=True):
        for key in ("image", "wrist_image", "state", "action"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
        assert a.instruction == b.instruction


# Values worked out by hand from the description of the public transforms.


def one(folder: Path, spec: str | None = None) -> data.Episode:
    (episode,) = data.RldsDataset(folder, spec=spec).episodes()
    return episode


def test_relative_grippers_of_rt_1(tmp_path: Path) -> None:
    changes = {
        # Nothing, close, nothing, a little noise, open, nothing.
        "action/gripper_closedness_action": [[0], [1], [0], [0.05], [-1], [0]],
        "action/world_vector": [[0.1, 0.2, 0.3]] * 6,
        "action/rotation_delta": [[0.4, 0.5, 0.6]] * 6,
        "observation/base_pose_tool_reached": [[1, 2, 3, 0, 0, 0, 1]] * 6,
        "observation/gripper_closed": [[0.25]] * 6,
    }
    folder, _ = sets.write(tmp_path, "fractal20220817_data", lengths=(6,), changes=changes)
    episode = one(folder)
    assert episode.action[:, 6].tolist() == [1, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(episode.action[0, :6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rtol=1e-6)
    assert episode.state is not None
    assert episode.state[0].tolist() == [1, 2, 3, 0, 0, 0, 1, 0.25]


def test_bridge_takes_what_was_reached_and_settles_the_gripper(tmp_path: Path) -> None:
    state = np.zeros((6, 7), np.float32)
    state[:, 0] = [9, 0, 1, 3, 6, 10]  # The first step is left out.
    state[:, 5] = [9, 0.5, 0.25, 0.25, 0, 1]
    state[:, 6] = [9, 10, 11, 12, 13, 14]
    action = np.zeros((6, 7), np.float32)
    action[:, 6] = [0, 1.0, 0.6, 0.0, 0.5, 0.7]
    changes = {"observation/state": state, "action": action}
    folder, (stored,) = sets.write(tmp_path, "bridge_orig", lengths=(6,), changes=changes)
    episode = one(folder)
    assert len(episode) == 4
    assert episode.action[:, 0].tolist() == [1, 2, 3, 4]
    assert episode.action[:, 5].tolist() == [-0.25, 0, -0.25, 1]
    # Open; in between, on its way to closed; closed; never settles, so the last value.
    np.testing.assert_allclose(episode.action[:, 6], [1, 0, 0, 0.7], rtol=1e-6)
    assert episode.state is not None
    assert episode.state[:, 6:].tolist() == [[0, 10], [0, 11], [0, 12], [0, 13]]
    np.testing.assert_array_equal(episode.image, stored["observation/image_0"][1:5])


def test_an_episode_too_short_for_its_spec_is_passed_over(tmp_path: Path) -> None:
    folder, _ = sets.write(tmp_path, "bridge_orig", lengths=(2, 5, 1))
    dataset = data.RldsDataset(folder)
    assert [episode.id for episode in dataset.episodes()] == [1]
    assert data.calibration_set(folder, frames=3).episode_keys == [(0, 1)] * 3


def test_quaternions_become_angles_about_fixed_axes(tmp_path: Path) -> None:
    half = np.sqrt(0.5)
    # A quarter turn about z; none; a third of a turn about (1, 1, 1), which is locked.
    turns = [[0, 0, half, half], [0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]]
    action = np.concatenate([np.zeros((3, 3)), turns, [[-1], [1], [0.25]]], axis=1)
    name = "furniture_bench_dataset_converted_externally_to_rlds"
    folder, _ = sets.write(tmp_path, name, lengths=(3,), changes={"action": action})
    found = one(folder).action
    right = np.pi / 2
    np.testing.assert_allclose(found[0, 3:], [0, 0, right, 1], atol=1e-6)
    np.testing.assert_allclose(found[1, 3:], [0, 0, 0, 0], atol=1e-6)
    turned = Rotation.from_euler("xyz", found[2, 3:6]).apply(np.eye(3))
    np.testing.assert_allclose(turned, np.roll(np.eye(3), 1, axis=1), atol=1e-3)
    assert found[2, 6] == 0.75


def test_hydra_s_proprio_is_position_angles_and_gripper(tmp_path: Path) -> None:
    state = np.arange(27, dtype=np.float32)[None].repeat(4, axis=0)
    name = "stanford_hydra_dataset_converted_externally_to_rlds"
    folder, _ = sets.write(tmp_path, name, lengths=(4,), changes={"observation/state": state})
    found = one(folder).state
    assert found is not None
    assert found[0].tolist() == [0, 1, 2, 7, 8, 9, 0, 24]


def test_droid_is_a_velocity_and_its_gripper_position_means_closed(tmp_path: Path) -> None:
    changes = {
        "action_dict/cartesian_velocity": [[0.1, 0, -0.1, 0.2, 0, -0.2]] * 3,
        "action_dict/gripper_position": [[0.0], [0.25], [1.0]],
    }
    folder, _ = sets.write(tmp_path, "droid", lengths=(3,), changes=changes)
    found = one(folder).action
    np.testing.assert_allclose(found[0], [0.1, 0, -0.1, 0.2, 0, -0.2, 1], rtol=1e-6)
    assert found[:, 6].tolist() == [1, 0.75, 0]


def test_language_table_moves_in_the_plane(tmp_path: Path) -> None:
    folder, _ = sets.write(
        tmp_path, "language_table", lengths=(2,), changes={"action": [[0.1, -0.2]] * 2}
    )
    episode = one(folder)
    np.testing.assert_allclose(episode.action[0], [0.1, -0.2, 0, 0, 0, 0, 1], rtol=1e-6)
    assert episode.instruction == "pick up object 0"


# Encodings on their own.


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1, 1)))
def test_grippers_agree_with_the_loops(values: np.ndarray) -> None:
    np.testing.assert_array_equal(encodings.closing(values)[:, None], absolute(values))
    opened = np.abs(values)
    np.testing.assert_array_equal(encodings.open_settled(opened)[:, None], binary(opened))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_quaternions_agree_with_scipy(seed: int) -> None:
    rotations = Rotation.random(5, random_state=np.random.RandomState(seed))
    angles = encodings.quaternion_to_euler(rotations.as_quat())
    again = Rotation.from_euler("xyz", angles)
    assert (rotations * again.inv()).magnitude().max() < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    st.text("abc/_", min_size=1, max_size=12),
    st.none() | st.integers(-9, 9),
    st.none() | st.integers(-9, 9),
    st.integers(1, 9),
)
def test_columns_are_python_slices(
    path: str, start: int | None, stop: int | None, size: int
) -> None:
    entries = Entries(path, start, stop)
    assert Entries.parse(str(entries)) == entries
    values = np.arange(2 * size, dtype=np.float64).reshape(2, size)
    inside = all(bound is None or -size <= bound <= size for bound in (start, stop))
    if inside and values[:, start:stop].size:
        np.testing.assert_array_equal(entries.of(list(values)), values[:, start:stop])
    else:
        with pytest.raises(DatasetError, match="has only"):
            entries.of(list(values))


@pytest.mark.parametrize("text", ["", "[0:3]", "a[0]", "a[0:3", "a[0:3]b", "a[x:3]"])
def test_other_notations_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a path"):
        Entries.parse(text)


# Mixtures.


def test_mixtures_are_openvlas() -> None:
    sizes = {name: len(weights) for name, weights in open_x.MIXTURES.items()}
    assert sizes == {
        "bridge": 1,
        "bridge_rt_1": 2,
        "rtx": 10,
        "oxe_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "oxe_magic_soup_plus_minus": 25,
    }
    for weights in open_x.MIXTURES.values():
        assert set(weights) <= set(open_x.SPECS)
    plus = open_x.mixture("oxe_magic_soup_plus")
    # Sums of the public lists.
    assert sum(plus.values()) == pytest.approx(31.03497585143)
    assert sum(open_x.mixture("rtx").values()) == pytest.approx(14.37497585143)
    assert (plus["droid"], plus["kuka"], plus["bc_z"]) == (0.06, 0.8341046294, 0.2)
    with pytest.raises(InputError, match="did you mean oxe_magic_soup_plus"):
        open_x.mixture("oxe_magic_soup_pluss")


# Errors.


def test_an_unknown_set_names_close_ones_and_says_what_to_do(tmp_path: Path) -> None:
    folder, _ = sets.write(tmp_path, "taco_plai", structure=sets.STRUCTURES["taco_play"])
    message = r"unknown data set 'taco_plai'; did you mean taco_play.*--spec.*docs/data.md"
    with pytest.raises(DatasetError, match=message):
        data.RldsDataset(folder)
    assert len(list(data.RldsDataset(folder, spec="taco_play").episodes())) == 2
    with pytest.raises(
        InputError, match=r"unknown spec 'taco'; did you mean taco_play.*docs/data.md"
    ):
        data.RldsDataset(folder, spec="taco")


def test_a_directory_s_name_stands_for_an_unknown_set(tmp_path: Path) -> None:
    """As in DROID, whose records go by another name than its folder."""
    folder, _ = sets.write(tmp_path, "faceblur", structure=sets.STRUCTURES["droid"])
    moved = tmp_path / "droid" / "1.0.0"
    moved.parent.mkdir()
    folder.rename(moved)
    assert data.RldsDataset(moved).spec.name == "droid"


@pytest.mark.parametrize(
    ("feature", "leaf", "message"),
    [
        ("action", None, "steps lack action, which spec 'dobbe' takes; they have .*observation"),
        ("action", "f4[6]", r"action\[6:7\]: action has only 6 entries"),
        ("action", "f4[2,7]", r"action: expected a vector, found shape \[2, 7\]"),
        ("language_instruction", None, "steps lack language_instruction"),
    ],
)
def test_a_set_that_does_not_fit_is_one_error(
    tmp_path: Path, feature: str, leaf: str | None, message: str
) -> None:
    step = {**sets.STRUCTURES["dobbe"].step, feature: leaf}
    if leaf is None:
        del step[feature]
    folder, _ = sets.write(tmp_path, "dobbe", structure=sets.Structure(step, {}))
    with pytest.raises(DatasetError, match=message):
        data.RldsDataset(folder)


def test_a_picture_that_is_none_is_one_error(tmp_path: Path) -> None:
    step = sets.STRUCTURES["dobbe"].step
    step = {**step, "observation": {**step["observation"], "wrist_image": "f4[8,12]"}}
    folder, _ = sets.write(tmp_path, "dobbe", structure=sets.Structure(step, {}))
    with pytest.raises(DatasetError, match=r"wrist_image: expected a picture \[H, W, 3\]"):
        data.RldsDataset(folder)


def test_a_gripper_of_another_meaning_is_refused(tmp_path: Path) -> None:
    action = np.zeros((5, 7), np.float32)
    action[:, 6] = [-1, 1, 1, 1, 1]
    folder, _ = sets.write(tmp_path, "dobbe", lengths=(5,), changes={"action": action})
    message = (
        r"episode 0 of 'train': step 0: action\[6:7\] is -1; the gripper lies between -1 and 1, "
        ".*'open' in spec 'dobbe'"
    )
    with pytest.raises(DatasetError, match=message):
        list(data.RldsDataset(folder).episodes())


def test_joint_actions_are_refused() -> None:
    with pytest.raises(InputError, match="its actions are joint positions"):
        open_x.get("berkeley_rpt_converted_externally_to_rlds")


# Specifications as files.


@pytest.mark.parametrize("spec", open_x.SPECS.values(), ids=lambda spec: spec.name)
def test_a_spec_survives_json(spec: open_x.DatasetSpec) -> None:
    assert open_x.DatasetSpec.from_json(spec.to_json(), "here") == spec


def test_a_spec_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        '{"name": "mine", "image": "observation/wrist_image", "control_hz": 5,'
        ' "instruction": "language_instruction", "action": {"translation": ["action[0:3]"],'
        ' "rotation": ["action[3:6]"], "gripper": ["action[-1:]"], "gripper_encoding": "closed"}}'
    )
    folder, (stored, _) = sets.write(tmp_path, "mine", structure=sets.STRUCTURES["dobbe"])
    dataset = data.RldsDataset(folder, spec=str(file))
    (episode, _) = dataset.episodes()
    assert episode.state is None
    np.testing.assert_allclose(episode.action[:, 6], 1 - stored["action"][:, 6], rtol=1e-6)
    # The manifest holds the whole specification: the file is needed no longer.
    calibration = data.calibration_set(folder, frames=4, spec=str(file))
    file.unlink()
    again = data.CalibrationSet.from_manifest(calibration.manifest)
    (one, other) = (next(each.batches(4)) for each in (calibration, again))
    np.testing.assert_array_equal(one["actions"], other["actions"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gripper_encoding": "opened"}, "unknown gripper_encoding 'opened'; did you mean open"),
        ({"movement": "deltas"}, "unknown movement 'deltas'; did you mean delta"),
        ({"rotation_encoding": "quaternion", "movement": "reached"}, "reached poses need Euler"),
        ({"gripper": []}, "'closed_signed' needs a column"),
        ({"gripper_encoding": "always_open"}, "'always_open' takes no columns"),
        ({"translation": "action[0:3]"}, "translation: 'action.0:3.' is not of the kind"),
        ({"translation": ["action[0]"]}, "expected a path, or a path and a slice"),
        ({"grip": []}, "unknown field 'grip'; did you mean gripper"),
    ],
)
def test_a_bad_spec_says_what_is_wrong(change: dict, message: str) -> None:
    tree = open_x.get("libero").to_json()
    tree["action"] = {**tree["action"], **change}
    with pytest.raises(InputError, match=message):
        open_x.DatasetSpec.from_json(tree, "spec.json")


def test_a_spec_lacks_a_field() -> None:
    tree = open_x.get("libero").to_json()
    del tree["image"]
    with pytest.raises(InputError, match=r"spec\.json: lacks image"):
        open_x.DatasetSpec.from_json(tree, "spec.json")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_x.load("absent.json")


# The documentation.

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


@pytest.mark.parametrize("spec", open_x.SPECS.values(), ids=lambda spec: spec.name)
def test_the_table_in_the_docs_is_true(spec: open_x.DatasetSpec) -> None:
    (row,) = (line for line in DOCS.splitlines() if line.startswith(f"| `{spec.name}`"))
    cells = [cell.strip().strip("`") for cell in row.split("|")[2:-1]]
    wrist, action = spec.wrist_image or "", spec.action
    assert cells == [
        spec.image.removeprefix("observation/"),
        wrist.removeprefix("observation/"),
        action.gripper_encoding,
        action.rotation_encoding,
        action.movement,
        f"{spec.control_hz:g}",
    ]


def test_the_docs_name_every_encoding_and_their_example_is_a_spec() -> None:
    for name in (*encodings.GRIPPERS, *encodings.ROTATIONS):
        assert f"`{name}`" in DOCS
    example = DOCS.split("```json\n")[1].split("```")[0]
    assert open_x.DatasetSpec.from_json(json.loads(example), "docs").action.rotation == (
        "action[3:7]",
    )
