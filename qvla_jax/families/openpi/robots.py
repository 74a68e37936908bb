"""Observations and units of LIBERO, DROID and ALOHA, as openpi's policies convert them.

A robot's observation, in our words, has `image` (and more cameras), `state` and `instruction`;
`from_client` makes it of what openpi's own clients send:

| robot  | keys of its client                                                           |
|--------|------------------------------------------------------------------------------|
| LIBERO | `observation/image`, `observation/wrist_image`, `observation/state`, `prompt` |
| DROID  | `observation/exterior_image_1_left`, `observation/wrist_image_left`,          |
|        | `observation/joint_position`, `observation/gripper_position`, `prompt`        |
| ALOHA  | `images` (`cam_high`, `cam_left_wrist`, `cam_right_wrist`), `state`, `prompt` |
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float, Float64, UInt8
from qvla_jax.errors import InputError
from qvla_jax.families.openpi.images import parse_image

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
    # Entries of an action that are -1 for open and 1 for closed, where the standard form of data
    # sets has 1 for open and 0 for closed.
    signed: tuple[int, ...]
    # openpi's clients' observation -> ours.
    from_client: Callable[[Mapping[str, Any]], dict[str, Any]]

    def from_standard(self, actions: Float[np.ndarray, "*b r"]) -> Float64[np.ndarray, "*b r"]:
        """The standard form of data sets -> what the robot's controller takes."""
        return np.where(self._is_signed, 1 - 2 * np.asarray(actions, np.float64), actions)

    def to_standard(self, actions: Float[np.ndarray, "*b r"]) -> Float64[np.ndarray, "*b r"]:
        """The inverse."""
        return np.where(self._is_signed, (1 - np.asarray(actions, np.float64)) / 2, actions)

    @property
    def _is_signed(self) -> np.ndarray:
        return np.isin(np.arange(self.action_dim), self.signed)


# What clients of real-time chunking add, in LeRobot's words and in those of openpi's authors.
# openpi's own server has no such entry.
_CHUNKING: Final = (
    *("inference_delay", "execution_horizon", "execute_horizon", "prev_chunk_left_over"),
    *("prev_action_chunk", "prefix_actions", "action_prefix", "prefix_attention_horizon"),
    *("prefix_attention_schedule", "max_guidance_weight"),
)
# Entries of ours that any client may add.
_ADDED: Final = ("noise", "seed", "unnorm_key")


def from_client(robot: Robot, message: Mapping[str, Any]) -> dict[str, Any]:
    """A client's observation in our words; one in our words stays as it is.

    Args:
        robot: whose client it is.
        message: as sent.

    Raises:
        InputError: an entry is missing, is not what it should be, or asks for real-time chunking;
            the message names it.
    """
    for key in _CHUNKING:
        if key in message:
            raise InputError(
                f"observation has {key!r}: real-time chunking is not supported; leave it out, and "
                "execute whole chunks or their beginnings"
            )
    if "images" not in message and not any(key.startswith("observation/") for key in message):
        return dict(message)
    added = {key: message[key] for key in _ADDED if key in message}
    return robot.from_client(message) | added


def relative_to(
    state: Float[np.ndarray, "... p"], relative: tuple[bool, ...], action_dim: int
) -> Float64[np.ndarray, "... 1 a"]:
    """The offset of actions that are relative to this state, and zero elsewhere."""
    dims = len(relative)
    added = np.zeros((*state.shape[:-1], action_dim))
    added[..., :dims] = np.where(relative, state[..., :dims], 0.0)
    return added[..., None, :]


def _entry(observation: Mapping[str, Any], key: str) -> Any:
    if key not in observation:
        held = ", ".join(map(str, observation))
        raise InputError(f"observation has no {key!r}; it holds: {held[:300]}")
    return observation[key]


def _image(observation: Mapping[str, Any], key: str) -> UInt8[np.ndarray, "H W 3"]:
    image = _entry(observation, key)
    if not isinstance(image, np.ndarray):
        raise InputError(f"{key}: expected an array, got {type(image).__name__}")
    return parse_image(image, where=key)


def _numbers(observation: Mapping[str, Any], key: str) -> np.ndarray:
    value = _entry(observation, key)
    array = (
        np.asarray(value)
        if isinstance(value, np.ndarray | np.generic)
        else np.asarray(value, object)
    )
    if array.dtype == object and all(type(v) in (int, float) for v in array.ravel()):
        array = array.astype(np.float64)
    if array.dtype.kind not in "fiu" or array.ndim > 1:
        raise InputError(f"{key}: expected numbers [p], got {array.dtype} {list(array.shape)}")
    return np.atleast_1d(array)


def _prompt(observation: Mapping[str, Any]) -> dict[str, str]:
    """The instruction; it may be missing."""
    if "prompt" not in observation:
        return {}
    prompt = observation["prompt"]
    prompt = prompt.item() if isinstance(prompt, np.ndarray) and prompt.ndim == 0 else prompt
    if isinstance(prompt, bytes):
        try:
            prompt = prompt.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"prompt: not UTF-8 ({error.reason})") from error
    if not isinstance(prompt, str):
        raise InputError(f"prompt: expected text, got {type(prompt).__name__}")
    return {"instruction": prompt}


def _libero(observation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": _image(observation, "observation/image"),
        "wrist_image": _image(observation, "observation/wrist_image"),
        "state": _numbers(observation, "observation/state"),
        **_prompt(observation),
    }


def _droid(observation: Mapping[str, Any]) -> dict[str, Any]:
    joints = _numbers(observation, "observation/joint_position")
    gripper = _numbers(observation, "observation/gripper_position")
    return {
        "image": _image(observation, "observation/exterior_image_1_left"),
        "wrist_image": _image(observation, "observation/wrist_image_left"),
        "state": np.concatenate([joints, gripper]),
        **_prompt(observation),
    }


def _aloha(observation: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"cam_high": "image", **_ALOHA_WRISTS}
    images = _entry(observation, "images")
    if not isinstance(images, Mapping):
        raise InputError(f"images: expected cameras by name, got {type(images).__name__}")
    # A fourth camera is known there, and no network takes it.
    if unknown := [key for key in images if key not in {*keys, "cam_low"}]:
        raise InputError(
            f"images: unexpected camera {unknown[0]!r:.60}; there are: {', '.join(keys)}"
        )
    _entry(images, "cam_high")
    return {
        **{own: _image(images, key) for key, own in keys.items() if key in images},
        "state": _numbers(observation, "state"),
        **_prompt(observation),
    }


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
        signed=(6,),
        from_client=_libero,
    ),
    # Seven joints and the gripper, in state and actions.
    "droid": Robot(
        cameras=("image", "wrist_image"),
        optional=(),
        state_dim=8,
        action_dim=8,
        relative=(True,) * 7 + (False,),
        signed=(),
        from_client=_droid,
    ),
    # Two arms of six joints and a gripper.
    "aloha": Robot(
        cameras=("image", "left_wrist_image", "right_wrist_image"),
        optional=("left_wrist_image", "right_wrist_image"),
        state_dim=14,
        action_dim=14,
        relative=((True,) * 6 + (False,)) * 2,
        signed=(),
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
