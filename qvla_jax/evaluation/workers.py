"""A process that runs episodes of a simulator and asks its parent for actions.

The worker begins with `Ready`. The parent sends an `Episode` to run, a chunk of actions, or a
`Replay` of the episode that just ended (to film or to record it: the simulator is deterministic, so
only episodes that are kept pay for pictures of each step); the worker answers each with an
`Observation`, a `Finished`, a `Replayed`, or a `Failure`.
"""

import abc
import dataclasses
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
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


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has started; its first message."""


Request: TypeAlias = Episode | np.ndarray | Replay
Reply: TypeAlias = Ready | Observation | Finished | Replayed | Failure


class DeadWorkerError(Exception):
    """A worker is gone; the message says what is known about why."""


class Worker(abc.ABC):
    """The parent's side of one worker.

    Attributes:
        episode: the episode it runs, until its `Finished` arrives.
        task: number of the task whose model it has compiled.
        answers: whether a message of it is to come.
    """

    def __init__(self) -> None:
        """One that starts: its `Ready` is to come."""
        self.episode: Episode | None = None
        self.task: int | None = None
        self.answers = True

    @abc.abstractmethod
    def send(self, message: Request) -> None:
        """Sends a message, to which one reply comes.

        Raises:
            DeadWorkerError: it is gone.
        """

    @abc.abstractmethod
    def receive(self) -> Reply:
        """The reply; waits for it.

        Raises:
            DeadWorkerError: it is gone.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends it."""


class Crew(abc.ABC):
    """Where workers run."""

    @abc.abstractmethod
    def start(self, make: MakeEnvironment) -> Worker:
        """Starts a worker."""

    @abc.abstractmethod
    def wait(self, workers: Sequence[Any], timeout: float | None) -> list[Any]:
        """The workers with a message, at least one; none if the time (s) passes without one."""


class ProcessWorker(Worker):
    """A worker in a process of this machine."""

    def __init__(self, process: Any, connection: Any):
        """Both as of `multiprocessing`."""
        super().__init__()
        self.process, self.connection = process, connection

    def send(self, message: Request) -> None:
        """See `Worker`."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def receive(self) -> Reply:
        """See `Worker`."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error

    def _died(self) -> DeadWorkerError:
        self.process.join(5)
        return DeadWorkerError(f"exit code {self.process.exitcode}")

    def stop(self) -> None:
        """See `Worker`."""
        self.connection.close()
        self.process.terminate()
        self.process.join(5)


class Processes(Crew):
    """Workers in processes of this machine, each with its own interpreter.

    OpenGL contexts do not survive a fork.
    """

    def start(self, make: MakeEnvironment) -> ProcessWorker:
        """See `Crew`."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_process, args=(theirs, make), daemon=True)
        process.start()
        theirs.close()
        return ProcessWorker(process, ours)

    def wait(self, workers: Sequence[ProcessWorker], timeout: float | None) -> list[ProcessWorker]:
        """See `Crew`."""
        by_connection = {worker.connection: worker for worker in workers}
        found: list[Any] = connection.wait(list(by_connection), timeout)
        return [by_connection[each] for each in found]


def _process(pipe: Connection, make: MakeEnvironment) -> None:
    # Ctrl-C reaches the whole process group; the parent decides about its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(pipe, make)


def serve(pipe: Connection, make: MakeEnvironment) -> None:
    """Answers the parent until it closes it."""
    runner = Runner(pipe, make)
    try:
        pipe.send(Ready())
        while True:
            message = pipe.recv()
            if isinstance(message, Episode):
                pipe.send(Finished(runner.run(message)))
            else:
                runner.replay(message)
                pipe.send(Replayed())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # The parent is gone or done.
    except InputError as error:
        pipe.send(Failure(str(error), user=True))
    except Exception:
        pipe.send(Failure(traceback.format_exc(), user=False))
    finally:
        runner.close()
        pipe.close()


class Runner:
    """Runs episodes, keeping the compiled model while the task stays the same."""

    def __init__(self, pipe: Connection, make: MakeEnvironment):
        """Compiles nothing yet."""
        self._connection, self._make = pipe, make
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
