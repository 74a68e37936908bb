"""The one way from a data set's steps to our standard, whatever its specification says.

Standard: an action has 7 entries, translation (3), rotation (3) and gripper, which is 1 for open
and 0 for closed; images are u8; the instruction is text.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float32, NpArray
from qvla_jax.data.episode import EncodedEpisode, Episode
from qvla_jax.data.open_x.columns import Entries, Values, numbers, paths, width
from qvla_jax.data.open_x.encodings import GRIPPERS, ROTATIONS, to_three
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.errors import DatasetError

# How far a gripper may lie outside [0, 1] by noise.
_SLACK: Final = 0.01


def check_features(spec: DatasetSpec, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Checks that a data set has what its specification takes.

    Args:
      spec: The specification.
      shapes: Of a step's features, by their paths.

    Raises:
      DatasetError: A feature is missing, or has another shape than is needed.
    """
    missing = [path for path in spec.features() if path not in shapes]
    if missing:
        raise DatasetError(
            f"steps lack {', '.join(missing)}, which spec {spec.name!r} takes; they have "
            f"{', '.join(sorted(shapes))}. Name a spec that fits, or add one (docs/data.md)."
        )
    for path in (spec.image, spec.wrist_image):
        if path is not None and (len(shapes[path]) != 3 or shapes[path][-1] != 3):
            raise DatasetError(f"{path}: expected a picture [H, W, 3], found {list(shapes[path])}")
    sizes = {}
    for text in spec.columns():
        path = Entries.parse(text).path
        shape = shapes[path]
        if len(shape) > 1 or None in shape:
            raise DatasetError(f"{path}: expected a vector, found shape {list(shape)}")
        sizes[path] = math.prod(size for size in shape if size is not None)
    action = spec.action
    for name, columns, expected in (
        ("translation", action.translation, 3),
        ("rotation", action.rotation, ROTATIONS[action.rotation_encoding]),
        ("gripper", action.gripper, 1 if action.gripper else 0),
    ):
        found = width(columns, sizes)
        if found != expected:
            raise DatasetError(
                f"{name} ({', '.join(map(str, columns))}) has {found} entries, expected {expected}"
            )
    width(spec.proprio, sizes)


def standardize(
    spec: DatasetSpec,
    values: Values,
    steps: int,
    *,
    episode_id: int,
    metadata: Mapping[str, Any],
    available: Mapping[str, Any],
) -> EncodedEpisode | None:
    """Makes an episode of a record's steps.

    Args:
      spec: Of the data set.
      values: The values of a feature in every step.
      steps: Number of steps.
      episode_id: Its position in the split.
      metadata: The episode's metadata.
      available: Features that there are, by their paths.

    Returns:
      The episode; None where no step is left of it.

    Raises:
      DatasetError: The gripper leaves [0, 1].
    """
    kept = slice(spec.skip_first, steps - (spec.action.movement == "reached"))
    count = len(range(steps)[kept])
    if not count:
        return None
    action = _actions(spec, values, steps)

    def floats(columns: tuple[str | None, ...]) -> Float32[NpArray, "t d"] | None:
        if not columns or any(path not in available for path in paths(columns)):
            return None
        return numbers(columns, values, steps)[kept].astype(np.float32)

    def optional(path: str, default: Any, dtype: type[np.generic]) -> NpArray:
        found = values(path)[kept] if path in available else [default] * count
        return np.asarray(found, dtype)

    episode = Episode(
        id=episode_id,
        instruction=instruction_text(values(spec.instruction)[kept][0]),
        image=None,
        wrist_image=None,
        state=floats(spec.proprio),
        joint_state=floats(spec.joint_state),
        action=action,
        reward=optional("reward", 0.0, np.float32),
        discount=optional("discount", 1.0, np.float32),
        is_terminal=optional("is_terminal", False, np.bool_),
        metadata=metadata,
    )
    return EncodedEpisode(
        episode=episode,
        image=values(spec.image)[kept],
        wrist_image=None if spec.wrist_image is None else values(spec.wrist_image)[kept],
    )


def instruction_text(value: Any) -> str:
    """Text as stored: bytes, or the numbers of its characters, padded with zeros."""
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
        codes = value.tolist()
        return "".join(map(chr, codes[: codes.index(0)] if 0 in codes else codes))
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _actions(spec: DatasetSpec, values: Values, steps: int) -> Float32[NpArray, "t 7"]:
    first, action = slice(spec.skip_first, None), spec.action
    translation = numbers(action.translation, values, steps)[first]
    rotation = numbers(action.rotation, values, steps)[first]
    pose = np.concatenate([translation, to_three(rotation, action.rotation_encoding)], axis=1)
    stored = numbers(action.gripper, values, steps)[first]
    gripper = GRIPPERS[action.gripper_encoding](stored[:, 0] if stored.size else np.ones(len(pose)))
    if not ((gripper >= -_SLACK) & (gripper <= 1 + _SLACK)).all():
        raise DatasetError(
            f"gripper lies between {stored.min():.4g} and {stored.max():.4g}, which is not what "
            f"{action.gripper_encoding!r} in spec {spec.name!r} means; choose another "
            "gripper_encoding"
        )
    if action.movement == "reached":
        pose, gripper = np.diff(pose, axis=0), gripper[:-1]
    full = np.concatenate([pose, np.clip(gripper, 0.0, 1.0)[:, None]], axis=1)
    return full.astype(np.float32)
