"""One convention for actions, whatever a data set stores: functions from `Episode` to `Episode`.

In every standardized action the gripper is 1 for open and 0 for closed, as in OpenVLA; the other
entries keep their units.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from qvla_jax.array_typing import Float, NpArray
from qvla_jax.data.episode import Episode, Transform
from qvla_jax.errors import InputError


def libero_actions(actions: Float[NpArray, "*b 7"]) -> Float[NpArray, "*b 7"]:
    """Standardizes LIBERO's actions, whose gripper is -1 open and +1 close."""
    gripper = 1.0 - np.clip(actions[..., -1:], 0.0, 1.0)
    return np.concatenate([actions[..., :-1], gripper], axis=-1).astype(actions.dtype)


def libero(episode: Episode) -> Episode:
    """Standardizes an episode of LIBERO."""
    return replace(episode, action=libero_actions(episode.action))


def identity(episode: Episode) -> Episode:
    """For data sets whose actions already follow the convention."""
    return episode


STANDARDIZATIONS: Final[Mapping[str, Transform]] = {"libero": libero, "none": identity}


def get(name: str) -> Transform:
    """The standardization of a name.

    Raises:
      InputError: There is none of that name.
    """
    if name not in STANDARDIZATIONS:
        raise InputError(
            f"no standardization {name!r}; there are {', '.join(sorted(STANDARDIZATIONS))}"
        )
    return STANDARDIZATIONS[name]
