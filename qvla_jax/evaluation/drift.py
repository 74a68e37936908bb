"""How far a policy strays from the path of another: in its actions, and in the gripper's path.

Two measures, both on paired episodes (same task, initial state and seed):

- **Accumulated action deviation**: along the rollouts of the reference policy, the candidate is
  queried at every state where the reference decides; the squared distances of the executed actions,
  in the normalized action space, add up over the episode. This is the cumulative error of QVLA
  (arXiv 2602.03782, section 3), free of the feedback through the simulator.
- **Drift**: the distance between the end effectors of both rollouts at the same time, with each
  policy acting on its own observations.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qvla_jax.array_typing import Float64, NpArray
from qvla_jax.evaluation.episodes import Episode, Result

# LIBERO's control loop.
_RATE = 20.0
# Quantile of the upper edge of the band around the median distance.
UPPER_QUANTILE = 0.9


class Traces:
    """Records of the running episodes, by episode."""

    def __init__(self) -> None:
        """Starts empty."""
        self._positions: dict[Episode, list[list[float]]] = {}
        self._deviations: dict[Episode, dict[str, list[float]]] = {}

    def saw(self, episode: Episode, observation: Mapping[str, Any]) -> None:
        """Records where the end effector is when the policy decides."""
        state = observation.get("state")
        if state is not None:
            position = np.asarray(state, np.float64)[:3].tolist()
            self._positions.setdefault(episode, []).append(position)

    def deviated(self, episode: Episode, candidate: str, deviation: float) -> None:
        """Records the distance of another policy's actions from those executed."""
        of_episode = self._deviations.setdefault(episode, {})
        of_episode.setdefault(candidate, []).append(deviation)

    def forget(self, episode: Episode) -> None:
        """Drops the records of an episode that begins again."""
        self._positions.pop(episode, None)
        self._deviations.pop(episode, None)

    def finish(self, result: Result) -> Result:
        """The result with the records of its episode."""
        return dataclasses.replace(
            result,
            positions=self._positions.pop(result.episode, []),
            deviations=self._deviations.pop(result.episode, {}),
        )


def action_deviation(
    actions: Float64[NpArray, "h a"], reference: Float64[NpArray, "h a"], *, executed: int
) -> float:
    """Squared distance of two normalized chunks, summed over the actions that are executed."""
    difference = np.asarray(actions, np.float64) - np.asarray(reference, np.float64)
    return float(np.square(difference[:executed]).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailurePrediction:
    """How well a number tells the candidate's failures, among episodes that the reference solves.

    Areas under the curve: 1 is perfect, 1/2 chance.
    """

    # The deviation that the episode accumulates.
    deviation: float
    # The steps that the reference takes.
    steps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift and accumulated deviation over the episodes that have them.

    The sequences have an entry for each moment at which the policies decide.
    """

    # Since the start of the episode.
    seconds: tuple[float, ...]
    # Pairs of episodes where both still run.
    pairs: tuple[int, ...]
    # Between the end effectors of these pairs, in m; `upper` is the quantile `UPPER_QUANTILE`.
    distance_median: tuple[float, ...]
    distance_upper: tuple[float, ...]
    # The reference's episodes on which the candidate was queried.
    deviation_episodes: int
    # Mean over these of the deviation accumulated so far, in squared normalized action. Episodes
    # that have ended keep theirs. Empty if there are none.
    deviation_mean: tuple[float, ...]
    # Mean over whole episodes, and its standard error; None with no, or fewer than two, episodes.
    deviation_total: float | None
    deviation_standard_error: float | None
    # None if the candidate fails or solves all.
    tells_failures: FailurePrediction | None


def summarize_drift(candidate: Iterable[Result], reference: Iterable[Result]) -> Drift | None:
    """Drift and accumulated deviation of a policy over the episodes that have them.

    Args:
        candidate: finished episodes of the candidate.
        reference: finished episodes of the reference.

    Returns:
        None if the two have no time steps in common.
    """
    candidates = {result.episode.pair: result for result in candidate}
    pairs = [
        (candidates[result.episode.pair], result)
        for result in reference
        if result.episode.pair in candidates
    ]
    distances = [_distances(a, b) for a, b in pairs if _comparable(a, b)]
    if not distances:
        return None
    deviating = [(own, base) for own, base in pairs if base.deviations.get(own.episode.policy_hash)]
    asked = [np.cumsum(base.deviations[own.episode.policy_hash]) for own, base in deviating]
    matrix = _padded(distances, mode="constant", constant_values=np.nan)
    median = np.nanmedian(matrix, axis=0)
    upper = np.nanquantile(matrix, UPPER_QUANTILE, axis=0)
    step = pairs[0][0].episode.open_loop_steps / _RATE
    mean: list[float] = []
    total = error = tells_failures = None
    if asked:
        totals = np.array([row[-1] for row in asked])
        mean = _padded(asked, mode="edge").mean(axis=0).tolist()
        total = float(totals.mean())
        if len(totals) > 1:
            error = float(totals.std(ddof=1) / np.sqrt(len(totals)))
        solved = [
            (own.success, base, row[-1])
            for (own, base), row in zip(deviating, asked, strict=True)
            if base.success
        ]
        failed = np.array([not success for success, _, _ in solved], bool)
        if 0 < failed.sum() < failed.size:
            deviations = np.array([deviation for *_, deviation in solved])
            steps = np.array([base.steps for _, base, _ in solved])
            tells_failures = FailurePrediction(
                deviation=_area_under_curve(deviations, failed),
                steps=_area_under_curve(steps, failed),
            )
    return Drift(
        seconds=tuple(step * k for k in range(matrix.shape[1])),
        pairs=tuple(np.isfinite(matrix).sum(axis=0).tolist()),
        distance_median=tuple(median.tolist()),
        distance_upper=tuple(upper.tolist()),
        deviation_episodes=len(asked),
        deviation_mean=tuple(mean),
        deviation_total=total,
        deviation_standard_error=error,
        tells_failures=tells_failures,
    )


def _area_under_curve(values: NpArray, positive: NpArray) -> float:
    """How often a positive has a greater value than a negative; ties count half."""
    greater = values[positive][:, None] - values[~positive][None]
    return float((np.sign(greater).mean() + 1) / 2)


def _comparable(candidate: Result, reference: Result) -> bool:
    """Whether both have positions at the same times."""
    same = candidate.episode.open_loop_steps == reference.episode.open_loop_steps
    return bool(same and candidate.positions and reference.positions)


def _distances(candidate: Result, reference: Result) -> Float64[NpArray, " t"]:
    """Distance (m) of the end effectors while both episodes run."""
    length = min(len(candidate.positions), len(reference.positions))
    ours, theirs = (np.array(r.positions[:length], np.float64) for r in (candidate, reference))
    return np.linalg.norm(ours - theirs, axis=1)


def _padded(rows: Sequence[Float64[NpArray, " _"]], **how: Any) -> Float64[NpArray, "e t"]:
    """Stacks rows, each padded at its end (`numpy.pad`) to the length of the longest."""
    length = max(row.size for row in rows)
    return np.stack([np.pad(row, (0, length - row.size), **how) for row in rows])
