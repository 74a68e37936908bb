"""The specifications, by data set.

Names and shapes of features are those of the data sets' own descriptions (features.json, and the
TensorFlow Datasets catalogue); which of them are used, and how the gripper is read, is what the
public training code of OpenVLA does (prismatic/vla/datasets/rlds/oxe), so that actions fit the
statistics of its checkpoints. Control frequencies are those that LeRobot lists for Open-X.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from qvla_jax.data.open_x.hub_specs import HUB_SPECS
from qvla_jax.data.open_x.joint_specs import JOINT_SPECS
from qvla_jax.data.open_x.spec import ActionSpec, DatasetSpec
from qvla_jax.errors import InputError, unknown

_TEXT: Final = "language_instruction"
_NATURAL: Final = "observation/natural_language_instruction"
_LIBERO: Final = ("spatial", "object", "goal", "10", "90")

_SPECS: Final = (
    # ---- Google's robots, in the layout of RT-1: actions in parts of their own.
    DatasetSpec(
        name="fractal20220817_data",
        image="observation/image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closing",
        ),
        proprio=("observation/base_pose_tool_reached", "observation/gripper_closed"),
        control_hz=3,
        notes="RT-1. Displacements in the base frame; proprio is position, quaternion, gripper.",
    ),
    DatasetSpec(
        name="kuka",
        image="observation/image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closing",
        ),
        proprio=(
            "observation/clip_function_input/base_pose_tool_reached",
            "observation/gripper_closed",
        ),
        control_hz=10,
        notes="QT-Opt: bin picking. Proprio is position, quaternion, gripper.",
    ),
    DatasetSpec(
        name="bc_z",
        image="observation/image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/future/xyz_residual[0:3]",),
            rotation=("action/future/axis_angle_residual[0:3]",),
            rotation_encoding="axis_angle",
            gripper=("action/future/target_close[0:1]",),
            gripper_encoding="closed",
        ),
        proprio=(
            "observation/present/xyz",
            "observation/present/axis_angle",
            None,
            "observation/present/sensed_close",
        ),
        control_hz=10,
        notes="The first of the ten next actions stored. Version 0.1.0: later ones are broken.",
    ),
    DatasetSpec(
        name="language_table",
        image="observation/rgb",
        instruction="observation/instruction",
        action=ActionSpec(
            translation=("action[0:2]", None),
            rotation_encoding="none",
            gripper_encoding="always_open",
        ),
        proprio=("observation/effector_translation", *(None,) * 6),
        control_hz=10,
        notes="Moves in the plane of the table, without a gripper.",
    ),
    # ---- BridgeData V2: what the robot reached is the action.
    DatasetSpec(
        name="bridge_orig",
        aliases=("bridge_dataset",),
        image="observation/image_0",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("observation/state[0:3]",),
            rotation=("observation/state[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="open_settled",
            movement="reached",
        ),
        proprio=("observation/state[0:6]", None, "observation/state[-1:]"),
        skip_first=1,
        control_hz=5,
        notes="From the project's own site. The first step has an all-zero action.",
    ),
    DatasetSpec(
        name="bridge",
        aliases=("bridge_oxe",),
        image="observation/image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("observation/state[0:3]",),
            rotation=("observation/state[3:6]",),
            gripper=("action/open_gripper",),
            gripper_encoding="open",
            movement="reached",
        ),
        proprio=("observation/state[0:6]", None, "observation/state[-1:]"),
        skip_first=1,
        control_hz=5,
        notes="The older copy in Open-X; the mixtures take bridge_orig.",
    ),
    # ---- Actions in parts of their own, other laboratories.
    DatasetSpec(
        name="taco_play",
        image="observation/rgb_static",
        wrist_image="observation/rgb_gripper",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/rel_actions_world[0:3]",),
            rotation=("action/rel_actions_world[3:6]",),
            gripper=("action/rel_actions_world[-1:]",),
            gripper_encoding="open_signed",
        ),
        # The description puts the gripper's width at 6; this is what the public code takes.
        proprio=("observation/robot_obs[0:6]", None, "observation/robot_obs[7:8]"),
        control_hz=15,
        notes="The data set's description says -1 is open; the public code takes 1 for open.",
    ),
    DatasetSpec(
        name="jaco_play",
        image="observation/image",
        wrist_image="observation/image_wrist",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation_encoding="none",
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closing",
        ),
        proprio=(
            "observation/end_effector_cartesian_pos[0:6]",
            None,
            "observation/end_effector_cartesian_pos[-1:]",
        ),
        control_hz=10,
    ),
    DatasetSpec(
        name="berkeley_cable_routing",
        image="observation/image",
        wrist_image="observation/wrist45_image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper_encoding="always_closed",
            movement="velocity",
        ),
        proprio=("observation/robot_state", None),
        control_hz=10,
        notes="The gripper holds the cable throughout.",
    ),
    DatasetSpec(
        name="roboturk",
        image="observation/front_rgb",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closed_signed",
        ),
        control_hz=10,
    ),
    DatasetSpec(
        name="viola",
        image="observation/agentview_rgb",
        wrist_image="observation/eye_in_hand_rgb",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/joint_states", "observation/gripper_states"),
        control_hz=20,
    ),
    DatasetSpec(
        name="berkeley_autolab_ur5",
        image="observation/image",
        wrist_image="observation/hand_image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/gripper_closedness_action",),
            gripper_encoding="closing",
        ),
        proprio=("observation/robot_state[6:14]",),
        control_hz=5,
    ),
    DatasetSpec(
        name="toto",
        image="observation/image",
        instruction=_NATURAL,
        action=ActionSpec(
            translation=("action/world_vector",),
            rotation=("action/rotation_delta",),
            gripper=("action/open_gripper",),
            gripper_encoding="open",
        ),
        proprio=("observation/state", None),
        control_hz=30,
        notes="Proprio is joint angles.",
    ),
    # ---- Converted by the laboratories themselves: the action is one vector.
    DatasetSpec(
        name="stanford_hydra_dataset_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed",
        ),
        proprio=(
            "observation/state[0:3]",
            "observation/state[7:10]",
            None,
            "observation/state[-3:-2]",
        ),
        control_hz=10,
    ),
    DatasetSpec(
        name="austin_buds_dataset_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state[0:8]",),
        control_hz=20,
    ),
    DatasetSpec(
        name="nyu_franka_play_dataset_converted_externally_to_rlds",
        image="observation/image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[-8:-5]",),
            rotation=("action[-5:-2]",),
            gripper=("action[-2:-1]",),
            gripper_encoding="open_signed",
        ),
        proprio=("observation/state[-6:]", None, None),
        control_hz=3,
        notes="The first seven entries of the stored action are joint velocities, the last ends.",
    ),
    DatasetSpec(
        name="furniture_bench_dataset_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:7]",),
            rotation_encoding="quaternion",
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state[0:7]", "observation/state[-1:]"),
        control_hz=10,
    ),
    DatasetSpec(
        name="ucsd_kitchen_dataset_converted_externally_to_rlds",
        image="observation/image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[6:7]",),
            gripper_encoding="open",
            movement="absolute",
        ),
        proprio=("observation/state[0:7]", None),
        control_hz=2,
        notes="The stored action is a target pose, which the public code takes as it is.",
    ),
    DatasetSpec(
        name="austin_sailor_dataset_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state",),
        control_hz=20,
    ),
    DatasetSpec(
        name="austin_sirius_dataset_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state",),
        control_hz=20,
    ),
    DatasetSpec(
        name="dlr_edan_shared_control_converted_externally_to_rlds",
        image="observation/image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed",
        ),
        proprio=("observation/state", None),
        control_hz=5,
    ),
    DatasetSpec(
        name="iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:7]",),
            rotation_encoding="quaternion",
            gripper=("action[7:8]",),
            gripper_encoding="open",
            movement="absolute",
        ),
        proprio=("observation/state[0:7]", "observation/state[7:8]"),
        control_hz=20,
        notes="The stored action is a target pose, which the public code takes as it is.",
    ),
    DatasetSpec(
        name="utaustin_mutex",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state[0:8]",),
        control_hz=20,
    ),
    DatasetSpec(
        name="berkeley_fanuc_manipulation",
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("observation/state[6:7]",),
            gripper_encoding="closed",
        ),
        proprio=("observation/state[0:6]", None, "observation/state[6:7]"),
        control_hz=10,
        notes="Gripper actions are not stored; its state stands for them.",
    ),
    DatasetSpec(
        name="cmu_stretch",
        image="observation/image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[6:7]",),
            gripper_encoding="open",
        ),
        proprio=("observation/state[0:3]", None, None, None, None, "observation/state[-1:]"),
        control_hz=10,
    ),
    DatasetSpec(
        name="fmb_dataset",
        aliases=("fmb",),
        image="observation/image_side_1",
        wrist_image="observation/image_wrist_1",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[6:7]",),
            gripper_encoding="open",
        ),
        proprio=("observation/eef_pose", "observation/state_gripper_pose"),
        control_hz=10,
    ),
    DatasetSpec(
        name="dobbe",
        image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[6:7]",),
            gripper_encoding="open",
        ),
        proprio=("observation/state",),
        control_hz=3.75,
        notes="The only camera is at the gripper.",
    ),
    DatasetSpec(
        name="droid",
        aliases=("droid_100",),
        image="observation/exterior_image_1_left",
        wrist_image="observation/wrist_image_left",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action_dict/cartesian_velocity[0:3]",),
            rotation=("action_dict/cartesian_velocity[3:6]",),
            gripper=("action_dict/gripper_position",),
            gripper_encoding="closed",
            movement="velocity",
        ),
        proprio=("observation/cartesian_position", "observation/gripper_position"),
        control_hz=15,
        notes="Training swaps the two outer cameras at random and leaves out steps without any "
        "movement; here the first camera and all steps are taken.",
    ),
    # ---- LIBERO, in the public modified sets and in ours.
    DatasetSpec(
        name="libero",
        aliases=(
            *(f"libero_{suite}" for suite in _LIBERO),
            *(f"libero_{suite}_no_noops" for suite in _LIBERO),
            "liber_o10",  # Inside the public libero_10_no_noops.
        ),
        image="observation/image",
        wrist_image="observation/wrist_image",
        instruction=_TEXT,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            rotation_encoding="axis_angle",
            gripper=("action[-1:]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation/state",),
        joint_state=("observation/joint_state",),
        control_hz=20,
    ),
)

SPECS: Final[Mapping[str, DatasetSpec]] = {spec.name: spec for spec in _SPECS}
# By every name of a data set, those of LeRobot sets and of actions of joints included.
NAMES: Final = {
    name: spec
    for spec in (*_SPECS, *HUB_SPECS, *JOINT_SPECS)
    for name in (spec.name, *spec.aliases)
}

# Open-X sets that move joints: there is no end-effector delta to take from them.
JOINT_ACTIONS: Final = (
    "berkeley_mvp_converted_externally_to_rlds",
    "berkeley_rpt_converted_externally_to_rlds",
    "roboset",
)


def find(name: str) -> DatasetSpec | None:
    """The specification for a data set's name or alias; None if there is none.

    Raises:
        InputError: the data set's actions are joint positions.
    """
    if name in JOINT_ACTIONS:
        raise InputError(
            f"{name}: its actions are joint positions; a policy of end-effector deltas cannot be "
            "calibrated on it"
        )
    return NAMES.get(name)


def not_found(name: str, known: Iterable[str], *, like: str) -> str:
    """The message about a data set without a specification.

    Args:
        name: of the data set.
        known: names to choose from.
        like: one of them, as an example.
    """
    return (
        f"{unknown('data set', name, known)} If it has the layout of one of these, name that "
        f"(--spec, such as {like}); else write a spec as a JSON file and name the file. "
        "docs/data.md shows how."
    )


def load(spec: DatasetSpec | str) -> DatasetSpec:
    """A specification from its name or from the name of a JSON file, which ends in .json.

    Raises:
        InputError: the name is unknown, or the file does not hold a specification.
    """
    if isinstance(spec, DatasetSpec):
        return spec
    if not spec.endswith(".json"):
        return get(spec)
    try:
        tree = json.loads(Path(spec).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{spec}: cannot be read as JSON ({error})") from error
    return DatasetSpec.from_json(tree, spec)


def get(name: str) -> DatasetSpec:
    """The specification with a name.

    Raises:
        InputError: the name is unknown (the message lists close matches), or its actions are
            refused.
    """
    spec = find(name)
    if spec is None:
        raise InputError(
            f"{unknown('spec', name, sorted(NAMES))} docs/data.md says how to add one."
        )
    return spec
