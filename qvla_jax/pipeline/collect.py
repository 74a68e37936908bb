"""Collects episodes in LIBERO, by the scripted expert or by a policy, and writes them as RLDS."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qvla_jax.data.libero import suites
from qvla_jax.data.libero.recorded import load_recording
from qvla_jax.data.libero.simulator import Rendering
from qvla_jax.errors import DatasetError, InputError, QvlaError
from qvla_jax.evaluation.closed_loop import run_episodes
from qvla_jax.evaluation.episodes import Episode, EpisodeLog, Result, episode_seed
from qvla_jax.evaluation.libero import EXPERT, ExpertPolicy, make_libero, noise_of, record
from qvla_jax.evaluation.workers import Keep, MakeEnvironment, Replay
from qvla_jax.model_options import ModelOptions
from qvla_jax.pipeline import files
from qvla_jax.pipeline.closed_loop import (
    EPISODES_FILE,
    Actor,
    check_simulator,
    crew_and_workers,
    executed_steps,
    horizon_and_size,
    load_actors,
    patience_with,
)
from qvla_jax.progress import Progress, no_progress

RECORDINGS = "episodes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig(ModelOptions):
    """Collects episodes in LIBERO and writes them as an RLDS data set.

    Starts are drawn at random, never the official initial states. The action of every step is the
    expert's, even where a policy acted and visited states that the expert would not.
    """

    # LIBERO suite with a scripted expert: libero_spatial, libero_object or libero_goal.
    sim: str
    # Data directory; the set is written to <out>/<name>/1.0.0, its source episodes to
    # <out>/episodes.
    out: Path
    # Who acts: "expert", or a policy as in `qvla evaluate --sim`.
    policy: str = EXPERT
    # Number of episodes of each task to keep.
    episodes_per_task: int = 20
    # Episodes to keep: those that succeed, or all; by default the expert's successes and all of a
    # policy's episodes.
    keep: Literal["successes", "all"] | None = None
    # Standard deviations of the noise added to the expert's actions, used in turn. A policy acts
    # without noise.
    noise: tuple[float, ...] = (0.0, 0.06, 0.12)
    # Tasks by number; by default the whole suite.
    tasks: tuple[int, ...] = ()
    # Episodes of each task in the split "heldout"; the others are in "train".
    heldout: int = 1
    # Name of the data set; by default that of the suite.
    name: str | None = None
    # Height and width of the pictures; 0 takes the policy's size.
    size: int = 0
    # fast or libero, see `qvla evaluate --sim`.
    rendering: Rendering = "fast"
    # Simulator processes; 0 runs one per core, of the cluster if there is one.
    workers: int = 0
    # As in `qvla evaluate --sim`.
    cluster: str | None = None
    # Seed of the starts and the noise.
    seed: int = 0
    # array_record is read without TensorFlow.
    file_format: Literal["array_record", "tfrecord"] = "array_record"

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        suite = suites.get(self.sim)
        suite.chosen(self.tasks)
        if not 0 <= self.heldout < self.episodes_per_task:
            raise InputError(
                f"heldout must lie between 0 and episodes_per_task - 1, got {self.heldout} of "
                f"{self.episodes_per_task}"
            )
        if not self.noise or min(self.noise) < 0:
            raise InputError("noise needs at least one standard deviation, none of them negative")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An episode with its recording in a file."""

    result: Result
    path: Path

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.result.task_name

    @property
    def seed(self) -> int:
        """Seed of the start state."""
        return self.result.episode.seed

    @property
    def key(self) -> str:
        """Name unique among the recordings."""
        return f"{self.task}/{self.seed}"


@dataclasses.dataclass(frozen=True)
class Collected:
    """What came out.

    Attributes:
        folder: folder of the data set.
        results: all episodes that were run, kept or not.
        kept: those in the data set.
    """

    folder: Path
    results: tuple[Result, ...]
    kept: tuple[Result, ...]


def collect(
    config: CollectConfig,
    *,
    policy: Actor | None = None,
    make: MakeEnvironment | None = None,
    keep: Keep = record,
    progress: Progress = no_progress,
) -> Collected:
    """Runs episodes until enough are kept, then writes the data set.

    Finished episodes are not run again: an interrupted run resumes where it stopped.

    Args:
        config: settings.
        policy: the acting policy, if already loaded.
        make: makes the environment of an episode, in a separate process.
        keep: records an episode, in that process.
        progress: called after each episode.

    Raises:
        InputError: TensorFlow, the simulator, a policy or a task is missing.
        DatasetError: the data set exists already.
        QvlaError: a task succeeds too rarely, or a simulator process failed.
    """
    files.check_folder(config.out)
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError("writing RLDS needs TensorFlow: pip install 'qvla-jax[rlds]'")
    existing = config.out / (config.name or config.sim)
    if existing.exists():
        raise DatasetError(f"{existing}: exists already; remove it or choose another --name")
    simulator = check_simulator(make_libero if make is None else make)
    if policy is None:
        policy = load_actors([config.policy], config, progress=progress)[config.policy]
    if isinstance(policy, ExpertPolicy):
        policy = ExpertPolicy(config.noise)
    run = _Run(config, policy, simulator, keep)
    make = make or functools.partial(make_libero, sigmas=config.noise)
    progress("episodes", run.done(), run.wanted)
    crew, workers = crew_and_workers(config.cluster, config.workers)
    while todo := run.lacking():
        run_episodes(
            todo,
            {policy.fingerprint: policy},
            make,
            workers=workers,
            crew=crew,
            on_result=lambda result: run.log.append(result, policy=config.policy),
            choose_replay=run.choose_replay(progress),
            patience=patience_with([policy]),
        )
        progress("episodes", run.done(), run.wanted)
    kept = [item for task in run.tasks for item in run.kept(task)]
    folder = _write(config, kept, size=run.size, expert=isinstance(policy, ExpertPolicy))
    return Collected(
        folder, tuple(run.results()), tuple(sorted((i.result for i in kept), key=_order))
    )


class _Run:
    """The episodes of a run, and those still missing."""

    def __init__(self, config: CollectConfig, policy: Actor, simulator: str, keep: Keep):
        self._config, self._keep = config, keep
        _, size = horizon_and_size(policy)
        self.size = config.size or size
        self.tasks = suites.get(config.sim).chosen(config.tasks)
        self.wanted = len(self.tasks) * config.episodes_per_task
        self._folder = config.out / RECORDINGS
        self.log = EpisodeLog(self._folder / EPISODES_FILE)
        self._all = (config.keep or ("successes" if policy_is_expert(policy) else "all")) == "all"
        self._common: dict[str, Any] = {
            "policy_hash": policy.fingerprint,
            "suite": config.sim,
            "initial_state": None,
            "max_steps": suites.get(config.sim).max_steps,
            "open_loop_steps": executed_steps(policy),
            "size": self.size,
            "rendering": config.rendering,
            "simulator": simulator,
        }

    def episode(self, task: int, number: int) -> Episode:
        """The episode of a number, counted from 0 in each task."""
        seed = episode_seed(self._config.seed, task, number)
        return Episode(task=task, seed=seed, **self._common)

    def path(self, episode: Episode) -> Path:
        """Path of an episode's recording."""
        who = episode.policy_hash.rpartition(":")[2][:12]
        start = f"{episode.suite}_{episode.task:02d}_{episode.seed}"
        return self._folder / who / f"{start}_{episode.size}_{episode.rendering}.npz"

    def lacking(self) -> list[Episode]:
        """The next episodes to run; none if enough are kept.

        Raises:
            QvlaError: a task was tried too often.
        """
        todo = []
        for task in self.tasks:
            missing = self._config.episodes_per_task - len(self.kept(task))
            tried = self._tried(task)
            if missing > 0 and len(tried) >= 3 * self._config.episodes_per_task + 10:
                solved = sum(self.log.results[e].success for e in tried)
                raise QvlaError(
                    f"{self._config.sim} task {task}: {solved} of {len(tried)} episodes succeeded, "
                    f"{self._config.episodes_per_task} are wanted; use --keep all or less --noise"
                )
            number = 0
            while missing > 0:
                episode = self.episode(task, number)
                if not self._finished(episode):
                    todo.append(episode)
                    missing -= 1
                number += 1
        return todo

    def kept(self, task: int) -> list[Recorded]:
        """Recorded episodes of a task, at most the requested number."""
        found = [
            Recorded(self.log.results[episode], self.path(episode))
            for episode in self._tried(task)
            if self._wants(self.log.results[episode])
        ]
        return found[: self._config.episodes_per_task]

    def done(self) -> int:
        """Episodes kept so far."""
        return sum(len(self.kept(task)) for task in self.tasks)

    def results(self) -> list[Result]:
        """All finished episodes of this run."""
        return [self.log.results[e] for task in self.tasks for e in self._tried(task)]

    def choose_replay(self, progress: Progress) -> Callable[[Result], Replay | None]:
        """Chooses the episodes to record."""

        def choose(result: Result) -> Replay | None:
            progress("episodes", self.done(), self.wanted)
            return Replay(self._keep, self.path(result.episode)) if self._wants(result) else None

        return choose

    def _tried(self, task: int) -> list[Episode]:
        tried, number = [], 0
        # Numbers finish out of order, and a killed run may leave a gap.
        limit = 4 * self._config.episodes_per_task + 20
        for number in range(limit):
            episode = self.episode(task, number)
            if self._finished(episode):
                tried.append(episode)
        return tried

    def _finished(self, episode: Episode) -> bool:
        result = self.log.results.get(episode)
        if result is None:
            return False
        return not self._wants(result) or self.path(episode).is_file()

    def _wants(self, result: Result) -> bool:
        return self._all or result.success


def policy_is_expert(policy: Actor) -> bool:
    """Whether the scripted expert acts."""
    return isinstance(policy, ExpertPolicy)


def _write(config: CollectConfig, kept: Sequence[Recorded], *, size: int, expert: bool) -> Path:
    from qvla_jax.data.libero.rlds_writer import episode_example, split_by_task, write_rlds

    def example(item: Recorded) -> dict[str, Any]:
        recording = load_recording(item.path)
        rewards = np.zeros(len(recording), np.float32)
        rewards[-1] = recording.success
        return episode_example(
            recording,
            rewards=rewards,
            source=f"{item.path.parent.name}/{item.path.name}",
            policy=config.policy,
            noise_sigma=noise_of(recording.seed, config.noise) if expert else 0.0,
        )

    splits: dict[str, list[Recorded]] = {"train": [], "heldout": []}
    for rest, held in split_by_task(
        kept, seed=config.seed, heldout=config.heldout, needed=config.heldout + 1
    ):
        splits["train"] += sorted(rest, key=lambda item: item.seed)
        splits["heldout"] += held
    actor = "the scripted expert" if expert else f"the policy {config.policy}"
    return write_rlds(
        {name: items for name, items in splits.items() if items},
        example,
        out=config.out,
        name=config.name or config.sim,
        size=size,
        description=f"Episodes of {actor} in LIBERO, labelled by the expert, with the features of "
        "modified_libero_rlds.",
        file_format=config.file_format,
    )


def _order(result: Result) -> tuple[int, int]:
    return result.episode.task, result.episode.seed
