"""Runs episodes in parallel processes, and the policy on batches of their observations.

Every call of a policy has as many rows as there are workers, with the last row repeated if fewer
wait: only one shape is compiled, and the numbers of a row do not depend on how many others happened
to be ready.
"""

import time
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, Protocol, TypeAlias

import numpy as np

from qvla_jax.array_typing import Float, NpArray
from qvla_jax.errors import InputError, QvlaError
from qvla_jax.evaluation.drift import Traces, action_deviation
from qvla_jax.evaluation.episodes import Episode, Result
from qvla_jax.evaluation.workers import (
    Failure,
    Finished,
    MakeEnvironment,
    Observation,
    Replay,
    Replayed,
    Worker,
    start_worker,
)

# How long (s) the policy waits for more observations once one is there: about the time that a
# worker needs for a chunk. Workers then fall into step, and calls are full.
PATIENCE = 0.25


class _Policy(Protocol):
    """The part of `inference.Policy` that is used here."""

    def infer_normalized(self, batch: Mapping[str, Any]) -> Float[NpArray, "b h a"]: ...

    def unnormalize_actions(
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
    start: Callable[[MakeEnvironment], Worker] = start_worker,
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
        start: starts a worker.

    Raises:
        InputError: a worker cannot use its input, such as an unknown initial state.
        QvlaError: a worker failed or died, or a policy gave actions that are not finite.
    """
    todo = list(episodes)
    traces = Traces()
    crew = [start(make) for _ in range(min(workers, len(todo)))]
    try:
        for worker in crew:
            _assign(worker, todo, crew)
        while any(worker.episode is not None for worker in crew):
            waiting: list[tuple[Worker, Mapping[str, Any]]] = []
            for worker in _ready(crew, patience):
                message = _receive(worker)
                if isinstance(message, Observation):
                    waiting.append((worker, message.content))
                elif isinstance(message, Finished):
                    result = traces.finish(message.result)
                    on_result(result)
                    replay = choose_replay(result)
                    if replay is None:
                        _assign(worker, todo, crew)
                    else:
                        worker.connection.send(replay)
                elif isinstance(message, Replayed):
                    _assign(worker, todo, crew)
            _act(waiting, policies, traces, shadows, rows=len(crew))
    finally:
        for worker in crew:
            worker.stop()


def _assign(worker: Worker, todo: list[Episode], crew: Sequence[Worker]) -> None:
    """Gives a worker its next episode, of its current task if possible, to compile rarely."""
    if not todo:
        worker.episode = None
        return
    others = {other.task for other in crew if other is not worker}
    choice = min(
        range(len(todo)),
        key=lambda i: (todo[i].task != worker.task, todo[i].task in others, i),
    )
    worker.episode = todo.pop(choice)
    worker.task = worker.episode.task
    worker.connection.send(worker.episode)


def _ready(crew: Sequence[Worker], patience: float) -> list[Worker]:
    """Waits for a message from a worker, and for the others until patience ends."""
    busy = {worker.connection: worker for worker in crew if worker.episode is not None}
    ready: list[Worker] = []
    deadline: float | None = None
    while busy:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        found = connection.wait(list(busy), timeout)
        if not found:
            break
        ready += [busy.pop(item) for item in found]  # pyright: ignore[reportArgumentType]
        deadline = deadline or time.monotonic() + patience
    return sorted(ready, key=crew.index)


def _receive(worker: Worker) -> Observation | Finished | Replayed:
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionResetError) as error:
        worker.process.join(5)
        raise QvlaError(
            f"a simulator process died (exit code {worker.process.exitcode}) in {_where(worker)}; "
            "finished episodes are kept, the same command goes on from there"
        ) from error
    if isinstance(message, Failure):
        if message.user:
            raise InputError(message.message)
        raise QvlaError(f"the simulator failed in {_where(worker)}:\n{message.message}")
    return message


def _where(worker: Worker) -> str:
    episode = worker.episode
    if episode is None:
        return "no episode"
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
        metric = policies[name].unnormalize_actions(chunks, state)
        for (worker, _, _), chunk in zip(members, metric, strict=True):
            worker.connection.send(chunk)
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
