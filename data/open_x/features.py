"""The declared features of a step, and the check that a specification fits them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from qvla_jax.data.open_x.columns import NUMBERS, Columns, Entries, paths, width
from qvla_jax.data.open_x.encodings import ROTATIONS
from qvla_jax.data.open_x.spec import ActionSpec, DatasetSpec
from qvla_jax.errors import DatasetError

# Numpy's kinds of text (also of files) and of integers.
_TEXT: Final = "OSU"
_INTEGERS: Final = "iu"


@dataclass(frozen=True)
class Feature:
    """A feature of a step as a data set's description declares it.

    Attributes:
        shape: None for a size that differs from step to step.
        dtype: object for text.
        encoded: whether it is stored as picture files, which decode to `dtype`.
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype
    encoded: bool = False

    def __str__(self) -> str:
        name = "text" if self.dtype.kind in _TEXT else self.dtype.name
        return f"{name} {['any' if n is None else n for n in self.shape]}".replace("'", "")

    @property
    def one_text(self) -> bool:
        """Whether it is a single text (or file)."""
        return self.dtype.kind in _TEXT and self.shape in ((), (1,))


def check_features(spec: DatasetSpec, features: Mapping[str, Feature]) -> None:
    """Checks that a data set has what its specification requires.

    Args:
        spec: the specification.
        features: the features of a step, by path.

    Raises:
        DatasetError: a feature is missing, or has the wrong dtype or shape.
    """
    missing = [path for path in spec.features() if path not in features]
    if missing:
        raise DatasetError(
            f"steps lack {', '.join(missing)}, which spec {spec.name!r} takes; they have "
            f"{', '.join(sorted(features))}. Name a spec that fits, or add one (docs/data.md)."
        )
    for path in spec.cameras().values():
        _check_picture(path, features[path])
    _check_instruction(spec.instruction, features[spec.instruction])
    columns = spec.columns()
    if has_all(spec.joint_state, features):
        columns = [*columns, *(text for text in spec.joint_state if text is not None)]
    sizes = {}
    for text in columns:
        path = Entries.parse(text).path
        feature = features[path]
        if len(feature.shape) > 1 or None in feature.shape:
            raise DatasetError(f"{path}: expected a vector, found shape {list(feature.shape)}")
        if feature.dtype.kind not in NUMBERS or feature.encoded:
            raise DatasetError(f"{path}: expected numbers, found {feature}")
        sizes[path] = math.prod(size for size in feature.shape if size is not None)
    action = spec.action
    groups: list[tuple[str, Columns, int]] = []
    if isinstance(action, ActionSpec):
        groups = [
            ("translation", action.translation, 3),
            ("rotation", action.rotation, ROTATIONS[action.rotation_encoding]),
            ("gripper", action.gripper, 1 if action.gripper else 0),
        ]
    for name, group, expected in groups:
        found = width(group, sizes)
        if found != expected:
            raise DatasetError(
                f"{name} ({', '.join(map(str, group))}) has {found} entries, expected {expected}"
            )
    width(spec.proprio, sizes)
    if has_all(spec.joint_state, features):
        width(spec.joint_state, sizes)


def _check_picture(path: str, feature: Feature) -> None:
    if feature.one_text:  # Files in a text feature; each declares its own format.
        return
    shape = feature.shape
    if len(shape) != 3 or shape[-1] != 3 or feature.dtype != np.uint8:
        raise DatasetError(
            f"{path}: expected a picture [H, W, 3] of uint8, or its file as text, found {feature}"
        )


def _check_instruction(path: str, feature: Feature) -> None:
    """One text, or a fixed number of characters; not a list of texts, a number, an embedding."""
    codes = (
        feature.dtype.kind in _INTEGERS and len(feature.shape) == 1 and None not in feature.shape
    )
    if feature.encoded or not (feature.one_text or codes):
        raise DatasetError(
            f"{path}: expected an instruction, one text (or the codes of its characters, integers "
            f"[n]), found {feature}; name another feature in the spec, or build the data set with "
            "one text in each step"
        )


def has_all(columns: Columns, features: Mapping[str, Feature]) -> bool:
    """Whether there are columns, and the data set has all of their features."""
    return bool(columns) and all(path in features for path in paths(columns))
