"""What closed_loop.json holds: success of each policy, paired comparisons, and drift."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qvla_jax.evaluation.drift import Drift, summarize_drift
from qvla_jax.evaluation.episodes import Result
from qvla_jax.evaluation.motion import Motion, compare_motion
from qvla_jax.evaluation.paired import Comparison, Success, compare

CLOSED_LOOP_KIND = "qvla_jax.closed_loop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesSuccess(Success):
    """A success rate, and how quickly tasks were solved."""

    # Control steps; None without a success.
    mean_steps_of_successes: float | None
    # Of all episodes that have one (`evaluation.episodes.jerk`).
    mean_jerk: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSuccess(EpisodesSuccess):
    """The success in one task."""

    # Number in the suite, and LIBERO's name.
    task: int
    task_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySuccess:
    """The success of one policy."""

    # The user's name for it, and its fingerprint.
    policy: str
    policy_hash: str
    overall: EpisodesSuccess
    tasks: tuple[TaskSuccess, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskComparison(Comparison):
    """Two policies in one task."""

    task: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyComparison:
    """A policy against the first one, on the same episodes."""

    candidate: str
    reference: str
    overall: Comparison
    # None if they have no time steps in common.
    drift: Drift | None
    # None without an episode that both solve.
    motion: Motion | None = None
    tasks: tuple[TaskComparison, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """What all episodes of a summary share; see `Episode`."""

    max_steps: int
    open_loop_steps: int
    size: int
    rendering: str
    simulator: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """The content of closed_loop.json."""

    format: Literal["qvla_jax.closed_loop"] = CLOSED_LOOP_KIND
    version: Literal[1] = 1
    # LIBERO's name.
    suite: str
    # What was said about public directories beyond their files.
    model_options: Mapping[str, Any]
    settings: EpisodeSettings
    # The first is the reference of the comparisons.
    policies: tuple[PolicySuccess, ...]
    comparisons: tuple[PolicyComparison, ...]
    provenance: Mapping[str, Any]


def policy_success(policy: str, results: Sequence[Result]) -> PolicySuccess:
    """Success overall and by task.

    Args:
        policy: the user's name for it.
        results: its finished episodes, at least one.
    """
    return PolicySuccess(
        policy=policy,
        policy_hash=results[0].episode.policy_hash,
        overall=EpisodesSuccess(**_success(results)),
        tasks=tuple(
            TaskSuccess(task=task, task_name=members[0].task_name, **_success(members))
            for task, members in _by_task(results).items()
        ),
    )


def compare_policies(results: Mapping[str, Sequence[Result]]) -> tuple[PolicyComparison, ...]:
    """Each policy compared with the first one.

    Args:
        results: policy by the user's name -> its finished episodes.
    """
    reference, *others = results
    of_reference = _by_task(results[reference])
    return tuple(
        PolicyComparison(
            candidate=name,
            reference=reference,
            overall=_compared(results[name], results[reference]),
            drift=summarize_drift(results[name], results[reference]),
            motion=compare_motion(results[name], results[reference]),
            tasks=tuple(
                TaskComparison(task=task, **vars(_compared(members, of_reference[task])))
                for task, members in _by_task(results[name]).items()
            ),
        )
        for name in others
    )


def _success(results: Sequence[Result]) -> dict[str, Any]:
    """Fields of an `EpisodesSuccess`."""
    solved = [r.steps for r in results if r.success]
    mean = sum(solved) / len(solved) if solved else None
    jerks = [r.jerk for r in results if r.jerk is not None]
    return {
        "successes": len(solved),
        "episodes": len(results),
        "mean_steps_of_successes": mean,
        "mean_jerk": sum(jerks) / len(jerks) if jerks else None,
    }


def _compared(candidate: Sequence[Result], reference: Sequence[Result]) -> Comparison:
    outcomes = [{r.episode.pair: r.success for r in side} for side in (candidate, reference)]
    return compare(*outcomes)


def _by_task(results: Sequence[Result]) -> dict[int, list[Result]]:
    tasks: dict[int, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.episode.task, []).append(result)
    return tasks
