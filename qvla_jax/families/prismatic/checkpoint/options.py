"""What the files of a public directory do not say."""

import dataclasses
from typing import Literal

from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.config import CAMERA_KEYS

ActionNormalization = Literal["quantiles", "min_max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the files of a public directory do not say, given by the user; None: not given.

    Attributes:
        unnorm_key: data set whose statistics un-normalize the actions; optional if there is only
            one.
        num_images: cameras.
        center_crop: whether raw images are cropped to the central 90 % of their area
            (--center-crop or --no-center-crop).
        action_horizon: actions per chunk.
        action_normalization: what maps to -1 and 1: the quantiles q01 and q99, or min and max.
        merge_adapter: the weights are the base of `lora_adapter/`, which is merged into them.

    Raises:
        InputError: a value is out of range.
    """

    unnorm_key: str | None = None
    num_images: int | None = None
    center_crop: bool | None = None
    action_horizon: int | None = None
    action_normalization: ActionNormalization | None = None
    merge_adapter: bool = False

    def __post_init__(self) -> None:
        if self.unnorm_key is not None and not isinstance(self.unnorm_key, str):
            raise InputError(f"unnorm_key: expected a name, got {self.unnorm_key!r}")
        for name in ("num_images", "action_horizon"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}: expected a whole number from 1 on, got {value!r}")
        if self.num_images is not None and self.num_images not in CAMERA_KEYS:
            raise InputError(
                f"num_images: {self.num_images} images are not supported; at most "
                f"{max(CAMERA_KEYS)} are, the main camera's and those at the grippers"
            )
        for name in ("center_crop", "merge_adapter"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.action_normalization not in (None, "quantiles", "min_max"):
            raise InputError(
                "action_normalization: expected 'quantiles' or 'min_max', got "
                f"{self.action_normalization!r}"
            )
