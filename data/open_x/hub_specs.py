"""The specifications of LeRobot data sets, by their names on the Hub.

Each says where its facts are from. The task in words is not a feature of the rows there: `task`
stands for it.
"""

from typing import Final

from qvla_jax.data.open_x.spec import ActionSpec, DatasetSpec

_TASK: Final = "task"

HUB_SPECS: Final = (
    # Copies of one conversion of OpenVLA's modified_libero_rlds (openpi's
    # convert_libero_data_to_lerobot.py), which stores actions and states as they are there: 1,693
    # episodes at declared 10 steps per second, of demonstrations at 20. LeRobot's documentation of
    # LIBERO (docs/source/libero.mdx at 7427f31) names cameras, state and the first two copies; the
    # third one's meta/info.json has the last names of each group.
    DatasetSpec(
        name="lerobot/libero",
        aliases=("HuggingFaceVLA/libero", "physical-intelligence/libero"),
        image="observation.images.image",
        wrist_image="observation.images.image2",
        instruction=_TASK,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            rotation_encoding="axis_angle",
            gripper=("action[6:7]",),
            gripper_encoding="closed_signed",
        ),
        proprio=("observation.state",),
        control_hz=10,
        same=(
            ("observation.images.image", "image"),
            ("observation.images.image2", "observation.images.wrist_image", "wrist_image"),
            ("observation.state", "state"),
            ("action", "actions"),
        ),
        notes="Not for copies whose gripper is 1 for open and 0 for closed, such as those that "
        "Open-X's transforms made: they need another gripper_encoding.",
    ),
    # Features of lerobot's port of DROID 1.0.1 (examples/port_datasets/port_droid.py at 7427f31),
    # which renames those of the RLDS set and changes no value; read as OpenVLA reads that one.
    DatasetSpec(
        name="lerobot/droid_1.0.1",
        aliases=("cadene/droid_1.0.1",),
        image="observation.images.exterior_1_left",
        wrist_image="observation.images.wrist_left",
        instruction=_TASK,
        action=ActionSpec(
            translation=("action.cartesian_velocity[0:3]",),
            rotation=("action.cartesian_velocity[3:6]",),
            gripper=("action.gripper_position",),
            gripper_encoding="closed",
            movement="velocity",
        ),
        proprio=("observation.state.cartesian_position", "observation.state.gripper_position"),
        control_hz=15,
        notes="Episodes without an instruction are left out, as in the public training code.",
    ),
    # Made by any4lerobot (openx2lerobot/openx_rlds.py and oxe_utils/ there), which stores what
    # OpenVLA's transform makes of bridge_orig: differences of reached poses, a settled gripper that
    # is 1 for open, a state with a column of zeros before the gripper.
    DatasetSpec(
        name="IPEC-COMMUNITY/bridge_orig_lerobot",
        image="observation.images.image_0",
        instruction=_TASK,
        action=ActionSpec(
            translation=("action[0:3]",),
            rotation=("action[3:6]",),
            gripper=("action[6:7]",),
            gripper_encoding="open",
        ),
        proprio=("observation.state",),
        control_hz=5,
    ),
)
