"""A process that runs episodes of a simulator and asks its parent for actions.

The parent sends an `Episode` to run, a chunk of actions, or a `Replay` of the episode that just
ended (to film or to record it: the simulator is deterministic, so only episodes that are kept pay
for pictures of each step); the worker answers with an `Observation`, a `Finished`, a `Replayed`, or
a `Failure`.
"""

import dataclasses
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.evaluation.episodes import Episode, Result, jerk


class Environment(Protocol):
    """The part of `data.libero.environment.LiberoEnvironment` that is used here."""

    name: str

    def reset(self, initial_state: int | None, *, seed: int) -> None:
        """Starts an episode."""
        ...

    def observe(self) -> Mapping[str, Any]:
        """What the policy sees."""
        ...

    def render(self, camera: str) -> np.ndarray:
        """A picture for the video, u8[height, width, 3]."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Executes a metric action of the policy; returns whether the task is done."""
        ...

    def close(self) -> None:
        """Frees the simulator."""
        ...


# Both are called in the worker, so they must be importable there: functions of a module.
MakeEnvironment: TypeAlias = Callable[[Episode], Environment]
# Replays the actions of an episode and writes its result to the path.
Keep: TypeAlias = Callable[[Environment, Episode, Sequence[np.ndarray], Path], None]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy sees."""

    content: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an episode."""

    result: Result


@dataclasses.dataclass(frozen=True)
class Replay:
    """Requests a replay of the last episode, to keep something of it."""

    keep: Keep
    path: Path


@dataclasses.dataclass(frozen=True)
class Replayed:
    """It is kept."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """The worker failed; `user` says whether its input was to blame."""

    message: str
    user: bool


@dataclasses.dataclass
class Worker:
    """The parent's side of one process."""

    process: Any
    connection: Any
    # The episode it runs, until its `Finished` arrives.
    episode: Episode | None = None
    # Number of the task whose model it has compiled.
    task: int | None = None

    def stop(self) -> None:
        """Ends the process."""
        self.connection.close()
        self.process.terminate()
        self.process.join(5)


def start_worker(make: MakeEnvironment) -> Worker:
    """Starts a process with its own interpreter: OpenGL contexts do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def _process(connection: Connection, make: MakeEnvironment) -> None:
    # Ctrl-C reaches the whole process group; the parent decides about its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(connection, make)


def serve(connection: Connection, make: MakeEnvironment) -> None:
    """Answers the parent until it closes the connection."""
    runner = Runner(connection, make)
    try:
        while True:
            message = connection.recv()
            if isinstance(message, Episode):
                connection.send(Finished(runner.run(message)))
            else:
                runner.replay(message)
                connection.send(Replayed())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # The parent is gone or done.
    except InputError as error:
        connection.send(Failure(str(error), user=True))
    except Exception:
        connection.send(Failure(traceback.format_exc(), user=False))
    finally:
        runner.close()


class Runner:
    """Runs episodes, keeping the compiled model while the task stays the same."""

    def __init__(self, connection: Connection, make: MakeEnvironment):
        """Compiles nothing yet."""
        self._connection, self._make = connection, make
        self._environment: Environment | None = None
        self._episode: Episode | None = None
        self._actions: list[np.ndarray] = []

    def run(self, episode: Episode) -> Result:
        """Runs an episode to its end; the parent supplies the actions."""
        environment = self._environment_of(episode)
        started = time.monotonic()
        environment.reset(episode.initial_state, seed=episode.seed)
        self._episode, self._actions = episode, []
        success = False
        while not success and len(self._actions) < episode.max_steps:
            self._connection.send(Observation(environment.observe()))
            chunk = self._connection.recv()
            left = episode.max_steps - len(self._actions)
            for action in chunk[: min(episode.open_loop_steps, left)]:
                self._actions.append(action)
                success = environment.step(action)
                if success:
                    break
        return Result(
            episode=episode,
            task_name=environment.name,
            success=success,
            steps=len(self._actions),
            seconds=round(time.monotonic() - started, 3),
            jerk=jerk(self._actions),
        )

    def replay(self, replay: Replay) -> None:
        """Replays the last episode to keep something of it."""
        assert self._environment is not None
        assert self._episode is not None
        replay.keep(self._environment, self._episode, self._actions, replay.path)

    def close(self) -> None:
        """Frees the simulator."""
        if self._environment is not None:
            self._environment.close()

    def _environment_of(self, episode: Episode) -> Environment:
        built_for = ("suite", "task", "size", "rendering")
        same = self._episode is not None and all(
            getattr(self._episode, name) == getattr(episode, name) for name in built_for
        )
        if self._environment is None or not same:
            self.close()
            self._environment = None
            self._environment = self._make(episode)
        return self._environment
