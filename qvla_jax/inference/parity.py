"""How far the actions of a policy moved on its way into another format."""

import dataclasses
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.inference.policy import Policy, batch_of_one

# Observations of noise that actions are compared on.
OBSERVATIONS: Final = 4


@dataclasses.dataclass(frozen=True)
class Parity:
    """Differences of normalized actions that the robot executes.

    Attributes:
        observations: how many were compared.
        largest: the largest absolute difference.
        rms: the root of the mean squared difference.
        actions_rms: the root of the mean square of the actions themselves.
    """

    observations: int
    largest: float
    rms: float
    actions_rms: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"normalized actions on {self.observations} observations of noise differ by at most "
            f"{self.largest:.2g}, RMS {self.rms:.2g} (of actions of RMS {self.actions_rms:.2g})"
        )


def noise_inputs(policy: Policy) -> list[Any]:
    """Prepared inputs of `OBSERVATIONS` observations of noise, each a batch of one."""
    found = []
    for seed in range(OBSERVATIONS):
        batch = batch_of_one(policy.fake_observation(seed))
        if policy.observation.sampled:
            batch["seed"] = np.array([seed])
        found.append(policy.prepare(batch))
    return found


def parity_of(
    policy: Policy, reference: Float[np.ndarray, "b h a"], found: Float[np.ndarray, "b h a"]
) -> Parity:
    """Compares normalized chunks.

    Args:
        policy: whose they are.
        reference: its own.
        found: those of what it became.
    """
    own = policy.layout.executed(reference).astype(np.float64)
    difference = policy.layout.executed(found).astype(np.float64) - own
    return Parity(
        observations=len(reference),
        largest=float(np.abs(difference).max()),
        rms=float(np.sqrt(np.mean(difference**2))),
        actions_rms=float(np.sqrt(np.mean(own**2))),
    )


def chunks_of(policy: Policy, inputs: list[Any]) -> Float[np.ndarray, "b h a"]:
    """Normalized chunks of prepared inputs."""
    return np.concatenate([policy.run(each) for each in inputs])
