"""OpenVLA-OFT's constants for three robots, which the weights do not determine.

The public code picks them by the data set's name on the command line
(`prismatic/vla/constants.py`); here the name of the statistics determines them, if the numbers of
entries agree.
"""

import dataclasses
from typing import Final

from qvla_jax.families.options import ActionNormalization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """Constants of one robot.

    Attributes:
        name: part of the names of its data sets.
        action_horizon: actions of a chunk.
        action_dim: entries of an action.
        proprio_dim: entries of the robot's state.
        action_normalization: of actions and proprio.
        num_images: cameras of its data sets: the main one, then those at the grippers.
    """

    name: str
    action_horizon: int
    action_dim: int
    proprio_dim: int
    action_normalization: ActionNormalization
    num_images: int

    def __str__(self) -> str:
        ends = "q01 and q99" if self.action_normalization == "quantiles" else "min and max"
        return (
            f"{self.name.upper()}: chunks of {self.action_horizon}, {self.action_dim} entries, "
            f"{self.action_normalization!r} ({ends}), {self.num_images} images"
        )


PLATFORMS: Final = (
    Platform(
        name="libero",
        action_horizon=8,
        action_dim=7,
        proprio_dim=8,
        action_normalization="quantiles",
        num_images=2,
    ),
    Platform(
        name="aloha",
        action_horizon=25,
        action_dim=14,
        proprio_dim=14,
        action_normalization="min_max",
        num_images=3,
    ),
    Platform(
        name="bridge",
        action_horizon=5,
        action_dim=7,
        proprio_dim=7,
        action_normalization="quantiles",
        num_images=1,
    ),
)


def platform_of(unnorm_key: str, *, action_dim: int, proprio_dim: int) -> Platform | None:
    """The robot named in the statistics' name, if its numbers of entries match.

    Args:
        unnorm_key: name of the statistics.
        action_dim: entries of an action.
        proprio_dim: entries of the robot's state; 0 if the policy takes none.
    """
    named = [p for p in PLATFORMS if p.name in unnorm_key.lower()]
    if len(named) != 1 or named[0].action_dim != action_dim:
        return None
    return named[0] if proprio_dim in (0, named[0].proprio_dim) else None
