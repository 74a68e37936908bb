"""Converts a data set's steps to standard form, following its specification.

Standard: an action has 7 entries, translation (3), rotation (3) and gripper, which is 1 for open
and 0 for closed, or is that of the robot's joints, as stored; images are u8; the instruction is
text.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float32, NpArray
from qvla_jax.data.episode import EncodedEpisode, Episode
from qvla_jax.data.open_x.columns import NUMBERS, Columns, Values, numbers
from qvla_jax.data.open_x.encodings import GRIPPERS, to_three
from qvla_jax.data.open_x.features import Feature, has_all
from qvla_jax.data.open_x.instructions import instructions
from qvla_jax.data.open_x.spec import DatasetSpec, JointActionSpec
from qvla_jax.data.pictures import Pictures
from qvla_jax.errors import DatasetError

# How far noise may push a gripper outside [0, 1].
_SLACK: Final = 0.01
# Features that are passed through if they hold one number per step, with what stands for them.
OPTIONAL: Final = {
    "reward": (0.0, np.float32),
    "discount": (1.0, np.float32),
    "is_terminal": (False, np.bool_),
}


def kept_steps(spec: DatasetSpec, steps: int) -> range:
    """The steps of a record of `steps` that its specification keeps; there may be none."""
    return range(steps)[spec.skip_first : steps - spec.action.is_difference]


def standardize(
    spec: DatasetSpec,
    values: Values,
    steps: int,
    *,
    name: str,
    episode_id: int,
    metadata: Mapping[str, Any],
    features: Mapping[str, Feature],
) -> EncodedEpisode | None:
    """Makes an episode from a record's steps.

    Args:
        spec: the data set's specification.
        values: the values of a feature in every step.
        steps: number of steps.
        name: names the episode and its set in errors about pictures, which are decoded later.
        episode_id: its position in the split.
        metadata: the episode's metadata.
        features: the available features, by path.

    Returns:
        The episode; None if no step remains.

    Raises:
        DatasetError: the gripper leaves [0, 1], a value is not finite, or an instruction is
            invalid; the message names step and feature. All kept steps are checked.
    """
    kept = kept_steps(spec, steps)
    if not kept:
        return None
    action = _actions(spec, values, steps)
    part = slice(kept.start, kept.stop)

    def floats(columns: Columns) -> Float32[NpArray, "t d"] | None:
        if not has_all(columns, features):
            return None
        return numbers(columns, values, kept).astype(np.float32)

    def optional(path: str) -> NpArray:
        default, dtype = OPTIONAL[path]
        feature = features.get(path)
        usable = feature is not None and feature.shape in ((), (1,))
        if feature is None or not usable or feature.dtype.kind not in NUMBERS:
            return np.full(len(kept), default, dtype)
        return np.asarray(values(path)[part], dtype).reshape(len(kept))

    def pictures(path: str) -> Pictures:
        shape = features[path].shape
        return Pictures(
            stored=values(path)[part],
            size=(shape[0], shape[1]) if len(shape) == 3 else (None, None),
            feature=path,
            episode=name,
            first_step=kept.start,
        )

    episode = Episode(
        id=episode_id,
        instructions=instructions(spec.instruction, values(spec.instruction)[part], kept),
        image=None,
        wrist_image=None,
        state=floats(spec.proprio),
        joint_state=floats(spec.joint_state),
        action=action,
        reward=optional("reward"),
        discount=optional("discount"),
        is_terminal=optional("is_terminal"),
        metadata=metadata,
    )
    return EncodedEpisode(
        episode=episode,
        pictures={camera: pictures(path) for camera, path in spec.cameras().items()},
    )


def _actions(spec: DatasetSpec, values: Values, steps: int) -> Float32[NpArray, "t a"]:
    taken, action = range(steps)[spec.skip_first :], spec.action
    if isinstance(action, JointActionSpec):
        return numbers(action.joints, values, taken).astype(np.float32)
    translation = numbers(action.translation, values, taken)
    rotation = numbers(action.rotation, values, taken)
    pose = np.concatenate([translation, to_three(rotation, action.rotation_encoding)], axis=1)
    stored = numbers(action.gripper, values, taken)
    gripper = GRIPPERS[action.gripper_encoding](stored[:, 0] if stored.size else np.ones(len(pose)))
    outside = np.flatnonzero((gripper < -_SLACK) | (gripper > 1 + _SLACK))
    if len(outside):
        raise DatasetError(
            f"step {taken[outside[0]]}: {action.gripper[0]} is {stored[outside[0], 0]:.4g}; the "
            f"gripper lies between {stored.min():.4g} and {stored.max():.4g}, which is not what "
            f"{action.gripper_encoding!r} in spec {spec.name!r} means; choose another "
            "gripper_encoding"
        )
    if action.is_difference:
        pose, gripper = np.diff(pose, axis=0), gripper[:-1]
    full = np.concatenate([pose, np.clip(gripper, 0.0, 1.0)[:, None]], axis=1)
    return full.astype(np.float32)
