"""Closed-loop success of policies in LIBERO: paired episodes, one line each, then tables."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from qvla_jax import devices
from qvla_jax.atomic import write_json
from qvla_jax.data.libero import installation, suites
from qvla_jax.data.libero.simulator import Rendering
from qvla_jax.errors import InputError
from qvla_jax.evaluation.closed_loop import PATIENCE, run_episodes
from qvla_jax.evaluation.cluster import Cluster
from qvla_jax.evaluation.episodes import Episode, EpisodeLog, Result, episode_seed
from qvla_jax.evaluation.libero import EXPERT, ExpertPolicy, make_libero
from qvla_jax.evaluation.success import (
    ClosedLoop,
    EpisodeSettings,
    compare_policies,
    policy_success,
)
from qvla_jax.evaluation.video import film, has_video_writer
from qvla_jax.evaluation.workers import Crew, MakeEnvironment, Processes, Replay
from qvla_jax.inference import Policy
from qvla_jax.inference.places import policy_folder
from qvla_jax.model_options import ModelOptions
from qvla_jax.pipeline import files
from qvla_jax.pipeline.policies import (
    check_acting,
    load_named_policy,
    model_of,
    takes_options,
)
from qvla_jax.plain import to_plain
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import SIMULATORS, package_versions, provenance
from qvla_jax.report.drift import save_drift

EPISODES_FILE = "episodes.jsonl"
VIDEO_FOLDER = "videos"
DRIFT_FIGURE = "drift.png"

EXPERT_SIZE = 128


# Anything that can act in an episode.
Actor: TypeAlias = Policy | ExpertPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedLoopConfig(ModelOptions):
    """Runs policies in the LIBERO simulator and reports how often they succeed.

    Episodes start from the official initial states, the same for every policy. Repeat the command
    to resume an interrupted run.
    """

    # LIBERO suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
    sim: str
    # Folder of the results: a JSON line per episode, tables, videos.
    out: Path
    # A policy; repeat the option to compare others with the first. MODEL@4 is the model rounded to
    # 4 bits, MODEL@RUN the allocation in the folder RUN of a `qvla run`, MODEL@RUN:3.5 and
    # MODEL@RUN:uniform4 those at other budgets, MODEL@RUN:gptq-w4 the result of `qvla quantize
    # --method gptq-w4` there, and "expert" the scripted expert.
    policy: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    # Episodes of each task, from the initial states 0, 1, ...
    episodes_per_task: int = 10
    # Tasks by number; by default the whole suite.
    tasks: tuple[int, ...] = ()
    # Actions executed before the policy is queried again; 0 executes as many as the policy's own
    # client, else the whole chunk.
    open_loop_steps: int = 0
    # fast (no reflections, supersampled instead of multisampled) or libero (its default, slower).
    # Use the rendering that the policy was trained on.
    rendering: Rendering = "fast"
    # Height and width of the rendered pictures; 0 takes the policy's size.
    size: int = 0
    # Simulator processes; 0 runs one per core, of the cluster if there is one.
    workers: int = 0
    # Ray cluster that runs the simulator processes: HOST:PORT, or auto on one of its nodes; by
    # default they run on this machine.
    cluster: str | None = None
    # Keep videos of the first success and the first failure of each task.
    videos: bool = True
    # Seed of what the initial states do not hold (poses of fixtures).
    seed: int = 0

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        suite = suites.get(self.sim)
        if not self.policy:
            raise InputError("name at least one policy: --policy libero-mini")
        if len(set(self.policy)) != len(self.policy):
            raise InputError("a policy is named twice")
        if not 1 <= self.episodes_per_task <= suite.initial_states:
            raise InputError(
                f"episodes_per_task must lie between 1 and {suite.initial_states}, the official "
                f"initial states of a task, got {self.episodes_per_task}"
            )
        suite.chosen(self.tasks)
        for name in ("open_loop_steps", "size", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")


def closed_loop(
    config: ClosedLoopConfig,
    *,
    policies: Mapping[str, Actor] | None = None,
    make: MakeEnvironment = make_libero,
    progress: Progress = no_progress,
) -> ClosedLoop:
    """Runs the episodes that are not finished yet and writes closed_loop.json.

    Args:
        config: settings.
        policies: policies by the names in `config.policy`, if they are loaded already.
        make: makes the environment of an episode, in a separate process.
        progress: called after each episode.

    Raises:
        InputError: the simulator, a policy or a task is missing, or a file is damaged.
        QvlaError: a simulator process failed.
    """
    files.check_folder(config.out)
    log = EpisodeLog(config.out / EPISODES_FILE)
    simulator = check_simulator(make)
    if config.videos and not has_video_writer():
        raise InputError(
            "videos need PyAV: pip install 'qvla-jax[libero]', or leave them out with --no-videos"
        )
    if policies is None:
        policies = load_actors(config.policy, config, progress=progress)
    planned = {name: plan(config, policies[name], simulator) for name in config.policy}
    names = {policies[name].fingerprint: name for name in reversed(config.policy)}
    episodes = [
        episode
        for task in suites.get(config.sim).chosen(config.tasks)
        for name in config.policy
        for episode in planned[name]
        if episode.task == task
    ]
    todo = [e for e in dict.fromkeys(episodes) if e not in log.results]
    total = len(set(episodes))
    progress("episodes", total - len(todo), total)

    def finished(result: Result) -> None:
        log.append(result, policy=names[result.episode.policy_hash])
        progress("episodes", total - sum(e not in log.results for e in todo), total)

    def choose_replay(result: Result) -> Replay | None:
        if not config.videos:
            return None
        name = names[result.episode.policy_hash]
        path = video_path(config.out / VIDEO_FOLDER, name, result)
        return None if path is None else Replay(film, path)

    crew, workers = crew_and_workers(config.cluster, config.workers)
    run_episodes(
        todo,
        {policies[name].fingerprint: policies[name] for name in config.policy},
        make,
        workers=workers,
        crew=crew,
        on_result=finished,
        choose_replay=choose_replay,
        shadows=shadows(policies, config.policy),
        patience=patience_with(policies.values()),
    )
    results = {name: log.outcomes(planned[name]) for name in config.policy}
    summary = ClosedLoop(
        suite=config.sim,
        model_options=config.said(),
        settings=_settings(planned[config.policy[0]][0]),
        policies=tuple(policy_success(name, found) for name, found in results.items()),
        comparisons=compare_policies(results),
        provenance=provenance(seed=config.seed),
    )
    drifts = {c.candidate: c.drift for c in summary.comparisons if c.drift is not None}
    if drifts:
        save_drift(drifts, config.out / DRIFT_FIGURE)
    write_json(config.out / files.CLOSED_LOOP, to_plain(summary))
    return summary


def shadows(policies: Mapping[str, Actor], names: Sequence[str]) -> dict[str, list[str]]:
    """The policies to query along the rollouts of the first: those of the same architecture."""
    reference, *others = (policies[name] for name in names)
    if isinstance(reference, ExpertPolicy):
        return {}
    return {
        reference.fingerprint: [
            other.fingerprint
            for other in others
            if not isinstance(other, ExpertPolicy) and other.config == reference.config
        ]
    }


def load_actors(
    names: Sequence[str], options: ModelOptions, *, progress: Progress | None = None
) -> dict[str, Actor]:
    """The scripted expert, or policies by their names.

    Args:
        names: as `ClosedLoopConfig.policy`.
        options: options of policies that are public directories, or were made from one.
        progress: see `load_policy`.

    Raises:
        InputError: there is no such policy, options apply to none of them, or a fine-tune's crop is
            not given.
    """
    models = {name: model_of(name)[0] for name in names if name != EXPERT}
    for model in models.values():
        policy_folder(model, options, progress=progress)  # fetched, if it is elsewhere
    taking = {name for name, model in models.items() if takes_options(model)}
    if options.said() and not taking:
        raise InputError(
            f"{', '.join(options.said())}: said, but {', '.join(names)} take their settings from "
            "their own files"
        )
    for model in models.values():
        check_acting(model, options)
    return {
        name: load_named_policy(name, options if name in taking else None)
        if name in models
        else ExpertPolicy()
        for name in names
    }


def crew_and_workers(cluster: str | None, workers: int) -> tuple[Crew, int]:
    """Where simulator processes run, and how many.

    Args:
        cluster: address of a Ray cluster; None is this machine.
        workers: how many the user wants; 0 is one per core.

    Raises:
        InputError: there is no such cluster, or it has fewer CPUs.
    """
    if cluster is None:
        return Processes(), workers or devices.cores()
    crew = Cluster(cluster)
    if workers > crew.cpus:
        raise InputError(f"workers {workers}: cluster {cluster} has {crew.cpus} CPUs, one for each")
    return crew, workers or crew.cpus


def horizon_and_size(policy: Actor) -> tuple[int, int]:
    """Actions in a policy's chunk, and the size of its pictures."""
    if isinstance(policy, ExpertPolicy):
        return 1, EXPERT_SIZE
    return policy.config.action_horizon, policy.observation.image_size


def executed_steps(policy: Actor) -> int:
    """Actions of a policy's chunk that its own client executes before it asks again."""
    if isinstance(policy, ExpertPolicy):
        return 1
    return policy.layout.executed_steps or policy.config.action_horizon


def patience_with(policies: Iterable[Actor]) -> float:
    """How long to wait for full batches: the expert gains nothing from them."""
    return 0.0 if all(isinstance(policy, ExpertPolicy) for policy in policies) else PATIENCE


def plan(config: ClosedLoopConfig, policy: Actor, simulator: str) -> list[Episode]:
    """The episodes of one policy, tasks in order."""
    horizon, size = horizon_and_size(policy)
    return [
        Episode(
            policy_hash=policy.fingerprint,
            suite=config.sim,
            task=task,
            initial_state=state,
            seed=episode_seed(config.seed, task, state),
            max_steps=suites.get(config.sim).max_steps,
            open_loop_steps=min(config.open_loop_steps or executed_steps(policy), horizon),
            size=config.size or size,
            rendering=config.rendering,
            simulator=simulator,
        )
        for task in suites.get(config.sim).chosen(config.tasks)
        for state in range(config.episodes_per_task)
    ]


def video_path(folder: Path, policy: str, result: Result) -> Path | None:
    """Path for the video of an episode; None if there is already one of its kind."""
    outcome = "success" if result.success else "failure"
    name = re.sub(r"[^A-Za-z0-9.@_-]+", "_", policy).strip("_")
    prefix = f"{name}_{result.episode.suite}_{result.episode.task:02d}_{outcome}_"
    if folder.is_dir() and any(path.name.startswith(prefix) for path in folder.iterdir()):
        return None
    return folder / f"{prefix}{result.episode.initial_state:02d}.mp4"


def check_simulator(make: MakeEnvironment | None) -> str:
    """Checks that episodes can run, before a policy is loaded.

    Args:
        make: makes their environments; only LIBERO's own are checked.

    Returns:
        The packages that simulate, with their versions; "none" if it is not LIBERO.

    Raises:
        InputError: LIBERO is missing or has wrong paths, or OpenGL does not render.
    """
    if make is not make_libero:
        return "none"
    versions = simulator_versions()
    installation.check_paths()
    installation.check_rendering()
    return versions


def simulator_versions() -> str:
    """The packages that simulate, with their versions.

    Raises:
        InputError: no LIBERO is installed.
    """
    found = package_versions(SIMULATORS)
    if not found.keys() & set(SIMULATORS[:2]):
        raise InputError(
            "LIBERO is not installed: pip install 'qvla-jax[libero]'; `qvla doctor` says more"
        )
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _settings(episode: Episode) -> EpisodeSettings:
    names = [field.name for field in dataclasses.fields(EpisodeSettings)]
    return EpisodeSettings(**{name: getattr(episode, name) for name in names})
