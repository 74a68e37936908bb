"""The specifications of data sets whose actions are those of the robot's joints.

openpi's policies of ALOHA and DROID act in these. States and actions are taken as they are stored,
grippers included; a policy's processor converts them (`adapt_to_pi`, for ALOHA).
"""

from typing import Final

from qvla_jax.data.open_x.spec import DatasetSpec, JointActionSpec

_TASK: Final = "task"
_ALOHA_STATIC: Final = (
    *("candy", "coffee", "coffee_new", "cups_open", "fork_pick_up", "pingpong_test", "pro_pencil"),
    *("screw_driver", "tape", "thread_velcro", "towel", "vinh_cup", "vinh_cup_left"),
    "ziploc_slide",
)

JOINT_SPECS: Final = (
    # Names of the sets are those that lerobot 0.3.3 lists (lerobot/__init__.py). Features of the
    # simulated ones are those that openpi's pi0_aloha_sim reads (src/openpi/training/config.py), of
    # the others those of its conversion of ALOHA's files
    # (examples/aloha_real/convert_aloha_data_to_lerobot.py): state and action have for each arm six
    # joints [rad] and a gripper.
    DatasetSpec(
        name="lerobot/aloha_sim_transfer_cube_human",
        aliases=tuple(
            f"lerobot/aloha_sim_{name}"
            for name in (
                *("insertion_human", "insertion_scripted", "transfer_cube_scripted"),
                *("insertion_human_image", "insertion_scripted_image"),
                *("transfer_cube_human_image", "transfer_cube_scripted_image"),
            )
        ),
        image="observation.images.top",
        instruction=_TASK,
        action=JointActionSpec(joints=("action",)),
        proprio=("observation.state",),
        control_hz=50,
    ),
    DatasetSpec(
        name="lerobot/aloha_static_battery",
        aliases=(
            *(f"lerobot/aloha_static_{name}" for name in _ALOHA_STATIC),
            *(
                f"lerobot/aloha_mobile_{name}"
                for name in ("cabinet", "chair", "elevator", "shrimp", "wash_pan", "wipe_wine")
            ),
        ),
        image="observation.images.cam_high",
        left_wrist_image="observation.images.cam_left_wrist",
        right_wrist_image="observation.images.cam_right_wrist",
        instruction=_TASK,
        action=JointActionSpec(joints=("action",)),
        proprio=("observation.state",),
        control_hz=50,
        notes="The camera below (cam_low), which some of them have, is not taken.",
    ),
    # As openpi reads DROID for its policies (src/openpi/training/droid_rlds_dataset.py), in the
    # names of the RLDS set and in those of lerobot's port of it. It is named, never found: the
    # set's name stands for the motion of the end effector.
    DatasetSpec(
        name="droid_joint_velocity",
        image="observation/exterior_image_1_left",
        wrist_image="observation/wrist_image_left",
        instruction="language_instruction",
        action=JointActionSpec(
            joints=("action_dict/joint_velocity", "action_dict/gripper_position"),
        ),
        proprio=("observation/joint_position", "observation/gripper_position"),
        control_hz=15,
        same=(
            ("observation/exterior_image_1_left", "observation.images.exterior_1_left"),
            ("observation/wrist_image_left", "observation.images.wrist_left"),
            ("action_dict/joint_velocity", "action.joint_velocity"),
            ("action_dict/gripper_position", "action.gripper_position"),
            ("observation/joint_position", "observation.state.joint_position"),
            ("observation/gripper_position", "observation.state.gripper_position"),
        ),
        notes="openpi trains on either exterior camera and any of three instructions; the first of "
        "each is taken here.",
    ),
)
