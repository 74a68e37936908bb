"""Runs episodes in parallel processes, and the policy on batches of their observations.

Every call of a policy has as many rows as there are workers, with the last row repeated if fewer
wait: only one shape is compiled, and the numbers of a row do not depend on how many others happened
to be ready.
"""

import collections
import contextlib
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from qvla_jax.array_typing import Float, NpArray
from qvla_jax.errors import InputError, QvlaError
from qvla_jax.evaluation.drift import Traces, action_deviation
from qvla_jax.evaluation.episodes import Episode, Result
from qvla_jax.evaluation.workers import (
    Crew,
    DeadWorkerError,
    Failure,
    Finished,
    MakeEnvironment,
    Observation,
    Processes,
    Ready,
    Replay,
    Replayed,
    Request,
    Worker,
)

# How long (s) the policy waits for more observations once one is there: about the time that a
# worker needs for a chunk. Workers then fall into step, and calls are full.
PATIENCE = 0.25
# Workers that may die in one episode, or while they start, before the run ends.
_ATTEMPTS = 3


class _Policy(Protocol):
    """The part of `inference.Policy` that is used here."""

    def infer_normalized(self, batch: Mapping[str, Any]) -> Float[NpArray, "b h a"]: ...

    def standard_actions(
        self, actions: Float[NpArray, "b h a"], state: Float[NpArray, "b p"] | None = None
    ) -> Float[NpArray, "b h a"]: ...


# What to keep of a finished episode, if anything.
ChooseReplay: TypeAlias = Callable[[Result], Replay | None]


def run_episodes(
    episodes: Sequence[Episode],
    policies: Mapping[str, _Policy],
    make: MakeEnvironment,
    *,
    workers: int,
    on_result: Callable[[Result], None],
    choose_replay: ChooseReplay = lambda result: None,
    shadows: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
    patience: float = PATIENCE,
    crew: Crew = Processes(),  # noqa: B008 (no state)
) -> None:
    """Runs episodes and passes on each result as it comes.

    Args:
        episodes: episodes to run, roughly in this order.
        policies: policies by their fingerprint.
        make: makes the environment of an episode, in the worker.
        workers: simulator processes.
        on_result: called with each finished episode.
        choose_replay: called after it: what to keep of this episode, or None.
        shadows: fingerprint of a policy -> those of others that are queried wherever it decides, so
            that the result holds their deviations. They must take the same observations.
        patience: how long (s) a policy waits for more observations once one is there.
        crew: where workers run; by default in processes of this machine.

    A worker that dies is replaced, and its episode begins again.

    Raises:
        InputError: a worker cannot use its input, such as an unknown initial state.
        QvlaError: a worker failed, several died in the same episode, or a policy gave actions that
            are not finite.
    """
    todo = list(episodes)
    if not todo:
        return
    traces, deaths, finished = Traces(), _Deaths(), set[Episode]()
    running = [crew.start(make) for _ in range(min(workers, len(todo)))]
    try:
        while todo or any(worker.episode is not None for worker in running):
            waiting: list[tuple[Worker, Mapping[str, Any]]] = []
            for worker in _ready(crew, running, patience):
                try:
                    message = _receive(worker)
                except DeadWorkerError as death:
                    if worker.episode is not None and worker.episode not in finished:
                        traces.forget(worker.episode)
                        todo.insert(0, worker.episode)
                    deaths.count(worker, death)
                    worker.stop()
                    running[running.index(worker)] = crew.start(make)
                    continue
                worker.answers = False
                if isinstance(message, Observation):
                    waiting.append((worker, message.content))
                elif isinstance(message, Finished):
                    result = traces.finish(message.result)
                    finished.add(result.episode)
                    on_result(result)
                    replay = choose_replay(result)
                    if replay is None:
                        worker.episode = None
                    else:
                        _send(worker, replay)
                else:
                    worker.episode = None
            for worker in running:
                if todo and worker.episode is None and not worker.answers:
                    _assign(worker, todo, running)
            _act(waiting, policies, traces, shadows, rows=len(running))
    finally:
        for worker in running:
            worker.stop()


class _Deaths:
    """Workers that died, by the episode that they ran."""

    def __init__(self) -> None:
        self._count: collections.Counter[Episode | None] = collections.Counter()

    def count(self, worker: Worker, death: DeadWorkerError) -> None:
        """Counts one more.

        Raises:
            QvlaError: it was one too many of the same episode, or of those that only start.
        """
        self._count[worker.episode] += 1
        if self._count[worker.episode] == _ATTEMPTS:
            raise QvlaError(
                f"{_ATTEMPTS} simulator processes died ({death}) in {_where(worker)}; finished "
                "episodes are kept, the same command goes on from there"
            ) from death


def _assign(worker: Worker, todo: list[Episode], others: Sequence[Worker]) -> None:
    """Gives a worker its next episode, of its current task if possible, to compile rarely."""
    tasks = {other.task for other in others if other is not worker}
    choice = min(
        range(len(todo)),
        key=lambda i: (todo[i].task != worker.task, todo[i].task in tasks, i),
    )
    worker.episode = todo.pop(choice)
    worker.task = worker.episode.task
    _send(worker, worker.episode)


def _send(worker: Worker, message: Request) -> None:
    # One that died says so when its reply is received.
    with contextlib.suppress(DeadWorkerError):
        worker.send(message)
    worker.answers = True


def _ready(crew: Crew, workers: Sequence[Worker], patience: float) -> list[Worker]:
    """Waits for a message from a worker, and for the others until patience ends."""
    busy = [worker for worker in workers if worker.answers]
    ready: list[Worker] = []
    deadline: float | None = None
    while busy:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        found = crew.wait(busy, timeout)
        if not found:
            break
        ready += found
        busy = [worker for worker in busy if worker not in found]
        deadline = deadline or time.monotonic() + patience
    return sorted(ready, key=workers.index)


def _receive(worker: Worker) -> Ready | Observation | Finished | Replayed:
    message = worker.receive()
    if isinstance(message, Failure):
        if message.user:
            raise InputError(message.message)
        raise QvlaError(f"the simulator failed in {_where(worker)}:\n{message.message}")
    return message


def _where(worker: Worker) -> str:
    episode = worker.episode
    if episode is None:
        return "its start"
    return f"{episode.suite} task {episode.task}, initial state {episode.initial_state}"


def _act(
    waiting: Sequence[tuple[Worker, Mapping[str, Any]]],
    policies: Mapping[str, _Policy],
    traces: Traces,
    shadows: Mapping[str, Sequence[str]],
    *,
    rows: int,
) -> None:
    """Sends a chunk to each waiting worker."""
    groups: dict[str, list[tuple[Worker, Episode, Mapping[str, Any]]]] = {}
    for worker, observation in waiting:
        assert worker.episode is not None
        traces.saw(worker.episode, observation)
        member = (worker, worker.episode, observation)
        groups.setdefault(worker.episode.policy_hash, []).append(member)
    for name, members in groups.items():
        observations = [observation for _, _, observation in members]
        chunks = decide(policies[name], observations, rows=rows)
        has_state = observations[0].get("state") is not None
        state = np.stack([each["state"] for each in observations]) if has_state else None
        metric = policies[name].standard_actions(chunks, state)
        for (worker, _, _), chunk in zip(members, metric, strict=True):
            _send(worker, chunk)
        # The simulators work in the meantime.
        for other in shadows.get(name, ()):
            answers = decide(policies[other], observations, rows=rows)
            for (_, episode, _), answer, chunk in zip(members, answers, chunks, strict=True):
                deviation = action_deviation(answer, chunk, executed=episode.open_loop_steps)
                traces.deviated(episode, other, deviation)


def decide(
    policy: _Policy, observations: Sequence[Mapping[str, Any]], *, rows: int
) -> Float[NpArray, "b h a"]:
    """Normalized chunks for observations, from one call with `rows` rows.

    Raises:
        QvlaError: an action is not finite.
    """
    padded = [*observations, *[observations[-1]] * (rows - len(observations))]
    batch: dict[str, Any] = {
        key: [o[key] for o in padded]
        if key == "instruction"
        else np.stack([np.asarray(o[key]) for o in padded])
        for key in observations[0]
    }
    chunks = np.asarray(policy.infer_normalized(batch))
    if not np.isfinite(chunks).all():
        raise QvlaError("the policy gave actions that are not finite: check its weights")
    return chunks[: len(observations)]
