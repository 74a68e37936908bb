"""The form of a data set's specification."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self

from qvla_jax.data.episode import CAMERAS
from qvla_jax.data.open_x.columns import Columns, Entries
from qvla_jax.data.open_x.encodings import (
    CONSTANT_GRIPPERS,
    GripperEncoding,
    Movement,
    RotationEncoding,
)
from qvla_jax.errors import InputError, unknown


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """Where an action's parts are and what they mean.

    Attributes:
        translation: three columns; see `qvla_jax.data.open_x.columns`.
        rotation: as many columns as its encoding stores.
        rotation_encoding: euler (angles), axis_angle (axis times angle), quaternion (x, y, z, w),
            or none, where the data set has no rotations.
        gripper: one column; none if the encoding is constant.
        gripper_encoding: which numbers mean open; see `encodings.GRIPPERS`.
        movement: what translation and rotation are. delta: a change of the end effector's pose for
            one step, in the units of the data set's controller. velocity: the same per unit of
            time. reached: poses, whose differences from one step to the next are the action (the
            last step has none). absolute: target poses, not converted, because the public
            checkpoints were trained on them.
    """

    translation: Columns
    rotation: Columns = ()
    rotation_encoding: RotationEncoding = "euler"
    gripper: Columns = ()
    gripper_encoding: GripperEncoding
    movement: Movement = "delta"

    @property
    def is_difference(self) -> bool:
        """Whether an action is the difference of two steps, so that the last step has none."""
        return self.movement == "reached"

    def columns(self) -> list[str]:
        """The columns that are read; those that are zero are none."""
        groups = (self.translation, self.rotation, self.gripper)
        return [text for group in groups for text in group if text is not None]

    def renamed(self, columns: Callable[[Columns], Columns]) -> Self:
        """The same with other names of features."""
        return dataclasses.replace(
            self,
            translation=columns(self.translation),
            rotation=columns(self.rotation),
            gripper=columns(self.gripper),
        )

    def check(self, where: str) -> None:
        """Checks the values.

        Raises:
            InputError: one is unknown, or does not go with another; `where` begins the message.
        """
        for name, value, known in (
            ("gripper_encoding", self.gripper_encoding, typing.get_args(GripperEncoding)),
            ("rotation_encoding", self.rotation_encoding, typing.get_args(RotationEncoding)),
            ("movement", self.movement, typing.get_args(Movement)),
        ):
            if value not in known:
                raise InputError(f"{where}: {unknown(name, value, known)}")
        constant = self.gripper_encoding in CONSTANT_GRIPPERS
        if constant == bool(self.gripper):
            expected = "takes no columns" if constant else "needs a column"
            raise InputError(f"{where}: gripper_encoding {self.gripper_encoding!r} {expected}")
        if self.is_difference and self.rotation_encoding not in ("euler", "none"):
            raise InputError(f"{where}: reached poses need Euler angles (rotation_encoding euler)")


@dataclass(frozen=True, kw_only=True)
class JointActionSpec:
    """Actions of the robot's joints, which are taken as they are stored.

    Attributes:
        joints: columns of the whole action, grippers included, in the order of the policy's.
    """

    joints: Columns

    is_difference: ClassVar[bool] = False

    def columns(self) -> list[str]:
        """The columns that are read; those that are zero are none."""
        return [text for text in self.joints if text is not None]

    def renamed(self, columns: Callable[[Columns], Columns]) -> Self:
        """The same with other names of features."""
        return dataclasses.replace(self, joints=columns(self.joints))

    def check(self, where: str) -> None:
        """Checks the values.

        Raises:
            InputError: there is no column; `where` begins the message.
        """
        if not self.joints:
            raise InputError(f"{where}: joints need columns")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """How to convert the steps of a data set: images, instruction, proprio and action.

    Features are named by their paths in a step, such as "observation/image".

    Attributes:
        name: name of the data set.
        image: feature of the main camera, or of the wrist camera if there is no other.
        wrist_image: feature of a wrist camera in addition to the main one.
        left_wrist_image: and `right_wrist_image`: those of a robot with two arms.
        instruction: feature with the task in words: text, or the numbers of its characters.
        action: see `ActionSpec` and `JointActionSpec`.
        proprio: columns of the robot's state; none if the set has no proprio.
        joint_state: columns of the joint angles (rad), read if the data set has them.
        control_hz: steps per second.
        skip_first: number of steps to drop at the beginning.
        same: features that have other names in some copies of the data set: groups of names, of
            which the first that a copy has is taken.
        aliases: other names of the data set.
        notes: what to know before using it.
    """

    name: str
    image: str
    wrist_image: str | None = None
    left_wrist_image: str | None = None
    right_wrist_image: str | None = None
    instruction: str
    action: ActionSpec | JointActionSpec
    proprio: Columns = ()
    joint_state: Columns = ()
    control_hz: float
    skip_first: int = 0
    same: tuple[tuple[str, ...], ...] = ()
    aliases: tuple[str, ...] = field(default_factory=tuple)
    notes: str = ""

    def __post_init__(self) -> None:
        where = f"spec {self.name!r}"
        self.action.check(where)
        if self.skip_first < 0 or not self.control_hz > 0:
            raise InputError(f"{where}: skip_first must not be negative, control_hz positive")
        for text in self.columns():
            Entries.parse(text)

    def columns(self) -> list[str]:
        """All columns that the data set must have."""
        return self.action.columns() + [text for text in self.proprio if text is not None]

    def cameras(self) -> dict[str, str]:
        """The features of the cameras that there are, by the names of `data.episode.CAMERAS`."""
        features = {name: getattr(self, name) for name in CAMERAS}
        return {name: path for name, path in features.items() if path is not None}

    def features(self) -> list[str]:
        """The features that the data set must have."""
        columns = [Entries.parse(text).path for text in self.columns()]
        return list(dict.fromkeys([*self.cameras().values(), self.instruction, *columns]))

    def for_features(self, features: Collection[str]) -> Self:
        """The specification with the names that a data set has; see `same`."""
        if not self.same:
            return self
        names = {
            name: next((other for other in group if other in features), name)
            for group in self.same
            for name in group
        }

        def columns(texts: Columns) -> Columns:
            return tuple(None if text is None else renamed(text) for text in texts)

        def renamed(text: str) -> str:
            entries = Entries.parse(text)
            return str(dataclasses.replace(entries, path=names.get(entries.path, entries.path)))

        cameras: dict[str, Any] = {
            camera: names.get(path, path) for camera, path in self.cameras().items()
        }
        return dataclasses.replace(
            self,
            **cameras,
            instruction=names.get(self.instruction, self.instruction),
            action=self.action.renamed(columns),
            proprio=columns(self.proprio),
            joint_state=columns(self.joint_state),
            same=(),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain lists and strings, without defaults."""
        return _plain(self)

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Self:
        """Inverse of `to_json`; `where` begins the message of the InputError it may raise."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("action"), Mapping):
            raise InputError(f"{where}: expected an object with the fields of DatasetSpec")
        kind = JointActionSpec if _JOINTS in tree["action"] else ActionSpec
        action = kind(**_arguments(kind, tree["action"], f"{where}: action"))
        return cls(**{**_arguments(cls, tree, where), "action": action})


_GROUPS: Final = "same"
_JOINTS: Final = "joints"
_LISTS: Final = ("translation", "rotation", "gripper", _JOINTS, "proprio", "joint_state", "aliases")
_TYPES: Final = {"control_hz": (int, float), "skip_first": int, "action": Mapping}


def _plain(spec: Any) -> dict[str, Any]:
    tree = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if isinstance(value, ActionSpec | JointActionSpec):
            tree[item.name] = _plain(value)
        elif value != default:
            tree[item.name] = _as_lists(value)
    return tree


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _arguments(kind: type, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            raise InputError(f"{where}: {unknown('field', name, fields)}")
    missing = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    if lacking := [name for name in needed if name not in tree]:
        raise InputError(f"{where}: lacks {', '.join(lacking)}")
    arguments = {}
    for name, value in tree.items():
        if name == _GROUPS:
            fits = isinstance(value, list) and all(
                isinstance(group, list) and group and all(isinstance(v, str) for v in group)
                for group in value
            )
            value = tuple(map(tuple, value)) if fits else value
        elif name in _LISTS:
            fits = isinstance(value, list) and all(v is None or isinstance(v, str) for v in value)
            value = tuple(value) if fits else value
        else:
            fits = isinstance(value, _TYPES.get(name, str))
        if not fits:
            raise InputError(f"{where}: {name}: {value!r} is not of the kind that is needed there")
        arguments[name] = value
    return arguments
