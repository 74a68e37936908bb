"""Observations and units of LIBERO, DROID and ALOHA, as openpi's policies convert them.

A robot's observation, in our words, has `image` (and more cameras), `state` and `instruction`;
`Robot.from_client` makes it of what openpi's own clients send.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float, Float64
from qvla_jax.errors import InputError

# openpi's names of the network's three cameras, in order.
SLOTS: Final = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class Robot:
    """One robot's side of the network."""

    # Observation key of each of the network's cameras, from the first; those that no observation of
    # this robot has come last and are omitted.
    cameras: tuple[str, ...]
    # Cameras that an observation may lack.
    optional: tuple[str, ...]
    state_dim: int
    # Entries of the network's actions that are the robot's.
    action_dim: int
    # Entries that are relative to the state where a policy predicts relative joints.
    relative: tuple[bool, ...]
    # openpi's clients' observation -> ours.
    from_client: Callable[[Mapping[str, Any]], dict[str, Any]]


def relative_to(
    state: Float[np.ndarray, "... p"], relative: tuple[bool, ...], action_dim: int
) -> Float64[np.ndarray, "... 1 a"]:
    """The offset of actions that are relative to this state, and zero elsewhere."""
    dims = len(relative)
    added = np.zeros((*state.shape[:-1], action_dim))
    added[..., :dims] = np.where(relative, state[..., :dims], 0.0)
    return added[..., None, :]


def _pick(observation: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The entries under our keys; the instruction may be missing."""
    for key in keys:
        if key not in observation and key != "prompt":
            raise InputError(f"observation has no {key!r}; it holds: {', '.join(observation)}")
    picked = {own: observation[key] for key, own in keys.items() if key in observation}
    if "instruction" in picked:
        picked["instruction"] = _text(picked["instruction"])
    return picked


def _text(prompt: Any) -> str:
    prompt = prompt.item() if isinstance(prompt, np.ndarray) else prompt
    return prompt.decode() if isinstance(prompt, bytes) else prompt


def _libero(observation: Mapping[str, Any]) -> dict[str, Any]:
    return _pick(
        observation,
        {
            "observation/image": "image",
            "observation/wrist_image": "wrist_image",
            "observation/state": "state",
            "prompt": "instruction",
        },
    )


def _droid(observation: Mapping[str, Any]) -> dict[str, Any]:
    picked = _pick(
        observation,
        {
            "observation/exterior_image_1_left": "image",
            "observation/wrist_image_left": "wrist_image",
            "observation/joint_position": "state",
            "observation/gripper_position": "gripper",
            "prompt": "instruction",
        },
    )
    gripper = np.atleast_1d(picked.pop("gripper"))
    return picked | {"state": np.concatenate([picked["state"], gripper])}


def _aloha(observation: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"cam_high": "image", **_ALOHA_WRISTS}
    images = observation.get("images", {})
    # A fourth camera is known there, and no network takes it.
    if unknown := sorted(set(images) - {*keys, "cam_low"}):
        raise InputError(f"images: unexpected camera {unknown[0]!r}; there are: {', '.join(keys)}")
    picked = _pick(observation, {"state": "state", "prompt": "instruction"})
    return picked | {own: images[key] for key, own in keys.items() if key in images}


_ALOHA_WRISTS: Final = {
    "cam_left_wrist": "left_wrist_image",
    "cam_right_wrist": "right_wrist_image",
}

ROBOTS: Final[Mapping[str, Robot]] = {
    # State: position, axis-angle, two fingers. Actions: six deltas and the gripper.
    "libero": Robot(
        cameras=("image", "wrist_image"),
        optional=(),
        state_dim=8,
        action_dim=7,
        relative=(True,) * 6 + (False,),
        from_client=_libero,
    ),
    # Seven joints and the gripper, in state and actions.
    "droid": Robot(
        cameras=("image", "wrist_image"),
        optional=(),
        state_dim=8,
        action_dim=8,
        relative=(True,) * 7 + (False,),
        from_client=_droid,
    ),
    # Two arms of six joints and a gripper.
    "aloha": Robot(
        cameras=("image", "left_wrist_image", "right_wrist_image"),
        optional=("left_wrist_image", "right_wrist_image"),
        state_dim=14,
        action_dim=14,
        relative=((True,) * 6 + (False,)) * 2,
        from_client=_aloha,
    ),
}

# ALOHA's joints that turn the other way in the data that the policies were trained on.
_FLIP: Final = np.array([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0] * 2)
_GRIPPERS: Final = (6, 13)
# Finger positions [m], closed and open, of the robot's state.
_LINEAR: Final = (0.01844, 0.05800)
# Lengths [m] of the gripper's arm and horn, from the Interbotix code.
_ARM, _HORN = 0.036, 0.022
# Angles [rad] that are 0 and 1 in the training data: encoder counts 2405 and 3110 of 4096, of
# which 2048 is zero.
_TRAINED: Final = (0.5476, 1.6296)
# Joint angles [rad], closed and open, of the robot's commands.
_COMMANDS: Final = (-0.6213, 1.4910)


def aloha_state(state: Float[np.ndarray, "... 14"]) -> Float64[np.ndarray, "... 14"]:
    """ALOHA's state -> that of the training data: joint signs, grippers as angles."""
    converted = _FLIP * state
    closed, opened = _LINEAR
    position = converted[..., _GRIPPERS] * (opened - closed) + closed
    sine = (_HORN**2 + position**2 - _ARM**2) / (2 * _HORN * position)
    low, high = _TRAINED
    converted[..., _GRIPPERS] = (np.arcsin(np.clip(sine, -1.0, 1.0)) - low) / (high - low)
    return converted


def aloha_commands(actions: Float[np.ndarray, "... 14"]) -> Float64[np.ndarray, "... 14"]:
    """Actions as trained on -> ALOHA's commands."""
    converted = _FLIP * actions
    low, high = _COMMANDS
    converted[..., _GRIPPERS] = (converted[..., _GRIPPERS] + _TRAINED[0] - low) / (high - low)
    return converted


def aloha_actions(commands: Float[np.ndarray, "... 14"]) -> Float64[np.ndarray, "... 14"]:
    """Inverse of `aloha_commands`."""
    converted = _FLIP * commands
    low, high = _COMMANDS
    converted[..., _GRIPPERS] = converted[..., _GRIPPERS] * (high - low) + low - _TRAINED[0]
    return converted
