"""Closed-loop episodes: their settings, their results, and the file of finished ones.

The file has one JSON line for each finished episode, appended as it ends. An episode counts as
finished if a line matches everything that determines its outcome: an interrupted run resumes where
it stopped, and one whose settings changed starts over and keeps the old lines.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from qvla_jax import atomic
from qvla_jax.data.libero.simulator import Rendering
from qvla_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """Everything that determines the outcome of an episode.

    Attributes:
        policy_hash: fingerprint of the policy.
        suite: LIBERO's name of the suite.
        task: number of the task in the suite.
        initial_state: number of the official initial state; None draws one from the seed.
        seed: draws what the initial state does not hold.
        max_steps: steps after which the episode fails.
        open_loop_steps: actions of each chunk to execute before the next query.
        size: height and width of the pictures.
        rendering: how pictures are rendered.
        simulator: packages that simulate, with their versions.
    """

    policy_hash: str
    suite: str
    task: int
    initial_state: int | None
    seed: int
    max_steps: int
    open_loop_steps: int
    size: int
    rendering: Rendering
    simulator: str

    @property
    def pair(self) -> tuple[str, int, int | None, int]:
        """Identifies the episode across policies."""
        return self.suite, self.task, self.initial_state, self.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished episode.

    Attributes:
        episode: the episode that was run.
        task_name: LIBERO's name of the task.
        success: whether the task was done.
        steps: actions executed, not counting the steps in which the objects settle.
        seconds: wall time, including waiting for the policy.
        jerk: of the executed actions (see `jerk`); None for fewer than three, or if
            an older version ran the episode.
        positions: position of the end effector (m) at each query of the policy.
        deviations: fingerprint of another policy -> the squared distances of its normalized actions
            from those that were executed, for each chunk.
    """

    episode: Episode
    task_name: str
    success: bool
    steps: int
    seconds: float
    jerk: float | None = None
    positions: Sequence[Sequence[float]] = dataclasses.field(default_factory=list)
    deviations: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del own["episode"]
        return {**dataclasses.asdict(self.episode), **own}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Reads the output of `to_dict`; further keys are ignored.

        Raises:
            KeyError: a key is missing.
        """
        names = [field.name for field in dataclasses.fields(Episode)]
        own = [field.name for field in dataclasses.fields(cls) if field.name != "episode"]
        return cls(
            episode=Episode(**{name: content[name] for name in names}),
            **{name: content[name] for name in own if name != "jerk"},
            jerk=content.get("jerk"),
        )


class EpisodeLog:
    """The file of finished episodes."""

    def __init__(self, path: Path):
        """Reads the file; removes an incomplete last line of a killed process.

        Raises:
            InputError: another line is not one of ours.
        """
        self.path = path
        self.results: dict[Episode, Result] = {}
        if path.exists():
            self._read()

    def append(self, result: Result, *, policy: str) -> None:
        """Adds a finished episode; it is on disk when this returns.

        Args:
            result: its result.
            policy: the user's name for the policy, for readers of the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"policy": policy, **result.to_dict()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[result.episode] = result

    def outcomes(self, episodes: Iterable[Episode]) -> list[Result]:
        """The results of those `episodes` that are finished, in order."""
        return [self.results[episode] for episode in episodes if episode in self.results]

    def _read(self) -> None:
        text = self.path.read_text("utf-8")
        whole, _, rest = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                result = Result.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}:{number}: not a line of closed-loop results ({error!r}); move "
                    "the file away or choose another --out"
                ) from error
            self.results[result.episode] = result
        if rest:
            atomic.write_text(self.path, whole + "\n" if whole else "")


def episode_seed(seed: int, task: int, initial_state: int) -> int:
    """Seed of one episode, independent of what else runs."""
    return int(np.random.SeedSequence([seed, task, initial_state]).generate_state(1)[0] >> 1)


def jerk(actions: Sequence[np.ndarray]) -> float | None:
    """Jerk of executed actions, which are velocities: the size of their second difference.

    Root mean square over steps, of the distance in the first three entries (translation), in the
    actions' own unit per step and step. In LIBERO, where 1 is 5 cm in a step of 1/20 s, times 400
    that is m/s^3.

    Args:
        actions: each [a], in order.

    Returns:
        None for fewer than three.
    """
    if len(actions) < 3:
        return None
    changes = np.diff(np.asarray(actions, np.float64)[:, :3], n=2, axis=0)
    return float(np.sqrt(np.mean(np.sum(changes**2, axis=1))))
