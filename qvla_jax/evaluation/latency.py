"""The time a policy takes for one action chunk."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qvla_jax.inference.policy import Policy

# The first calls compile, and warm the caches.
WARM_UP = 3


def chunk_seconds(
    policies: Mapping[str, Policy], observations: Iterable[Any], *, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Times policies alternately on the same observations, so that other load affects all of them.

    Measures `Policy.run`, from the prepared observation to the actions on the host.

    Args:
        policies: policies by name.
        observations: inputs of `Policy.prepare`, one observation each.
        warm_up: observations at the beginning that are not counted.

    Returns:
        Name -> wall-clock seconds of each counted call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for number, observation in enumerate(observations):
        for name, policy in policies.items():
            inputs = policy.prepare(observation)
            start = time.perf_counter()
            np.asarray(policy.run(inputs))
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """Wall-clock times of a policy's calls, in milliseconds."""

    calls: int
    median_ms: float
    # 95th percentile.
    p95_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """One chunk of the full and of the packed policy, alternating call by call."""

    full: ChunkTimes
    packed: ChunkTimes
    # Median over the calls of full / packed.
    speed_up: float


def summarize_seconds(seconds: Iterable[float]) -> ChunkTimes:
    """Median and 95th percentile of the times of calls, given in seconds."""
    values = 1e3 * np.asarray(list(seconds), np.float64)
    median, high = np.percentile(values, [50, 95])
    return ChunkTimes(calls=len(values), median_ms=float(median), p95_ms=float(high))
