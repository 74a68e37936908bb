"""How a robot moves, beside whether it succeeds: how long a task takes, and how smoothly."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from qvla_jax.evaluation.episodes import Result
from qvla_jax.evaluation.paired import CONFIDENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """A quantity of one policy over that of another: geometric mean over pairs of episodes."""

    mean: float
    # Of Student's t on the logarithms; None for a single pair.
    interval_95: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Motion:
    """How a policy moves, against another in the same episodes, where both succeed."""

    # Pairs of episodes that both solve.
    pairs: int
    # Steps until the task is done.
    steps: Ratio
    # None if no pair has one.
    jerk: Ratio | None


def compare_motion(candidate: Sequence[Result], reference: Sequence[Result]) -> Motion | None:
    """Compares two policies in the episodes that both solve.

    Args:
        candidate: finished episodes of one policy.
        reference: those of the other.

    Returns:
        None if there is no such episode.
    """
    others = {result.episode.pair: result for result in reference if result.success}
    pairs = [
        (result, others[result.episode.pair])
        for result in candidate
        if result.success and result.episode.pair in others
    ]
    if not pairs:
        return None
    smooth = [(one.jerk, other.jerk) for one, other in pairs if one.jerk and other.jerk]
    return Motion(
        pairs=len(pairs),
        steps=_ratio([(one.steps, other.steps) for one, other in pairs]),
        jerk=_ratio(smooth) if smooth else None,
    )


def _ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    logs = np.log([one / other for one, other in pairs])
    mean = float(logs.mean())
    interval = None
    if len(logs) > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1))
        half = quantile * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        interval = (math.exp(mean - half), math.exp(mean + half))
    return Ratio(mean=math.exp(mean), interval_95=interval)
