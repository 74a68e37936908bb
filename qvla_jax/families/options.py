"""What the files of a policy do not say, given by the user."""

import dataclasses
from typing import Any, Literal

from qvla_jax.errors import InputError

ActionNormalization = Literal["quantiles", "min_max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the files of a public directory do not say, given by the user; None: not given.

    Each family takes some of them, and refuses the others by name.

    >>> LoadOptions(unnorm_key="bridge_orig", center_crop=False).said()
    {'unnorm_key': 'bridge_orig', 'center_crop': False}

    Attributes:
        unnorm_key: data set whose statistics un-normalize the actions (openpi's asset id); optional
            if there is only one.
        num_images: cameras.
        center_crop: whether raw images are cropped to the central 90 % of their area
            (--center-crop or --no-center-crop).
        action_horizon: actions per chunk.
        action_normalization: what maps to -1 and 1: the quantiles q01 and q99, or min and max.
        merge_adapter: the weights are the base of `lora_adapter/`, which is merged into them.
        preset: openpi's training configuration, such as pi05_libero.
        tokenizer: file of the tokenizer, where checkpoints come without one (openpi).
        executed_steps: actions of a chunk that the robot's client executes before it asks again,
            which errors count (openpi).

    Raises:
        InputError: a value is out of range.
    """

    unnorm_key: str | None = None
    num_images: int | None = None
    center_crop: bool | None = None
    action_horizon: int | None = None
    action_normalization: ActionNormalization | None = None
    merge_adapter: bool = False
    preset: str | None = None
    tokenizer: str | None = None
    executed_steps: int | None = None

    def __post_init__(self) -> None:
        for name, what in (("unnorm_key", "name"), ("preset", "name"), ("tokenizer", "path")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name}: expected a {what}, got {value!r}")
        for name in ("num_images", "action_horizon", "executed_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}: expected a whole number from 1 on, got {value!r}")
        for name in ("center_crop", "merge_adapter"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.action_normalization not in (None, "quantiles", "min_max"):
            raise InputError(
                "action_normalization: expected 'quantiles' or 'min_max', got "
                f"{self.action_normalization!r}"
            )

    def said(self) -> dict[str, Any]:
        """Keyword arguments for `load_policy`: those that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(LoadOptions)
            if (value := getattr(self, field.name)) != field.default
        }
