"""Simulator processes on a Ray cluster.

Ray places one actor for each worker on the cluster's nodes, wherever a CPU is free, and notices the
nodes that die. All nodes need the same versions of this package and of the simulator.
"""

import multiprocessing
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qvla_jax.atomic import write_bytes
from qvla_jax.errors import InputError, first_line
from qvla_jax.evaluation.workers import (
    Crew,
    DeadWorkerError,
    Failure,
    MakeEnvironment,
    Replay,
    Replayed,
    Reply,
    Request,
    Worker,
    serve,
)
from qvla_jax.provenance import SIMULATORS, package_versions

# What decides the outcome of an episode besides its settings.
_PACKAGES: Final = ("qvla-jax", *SIMULATORS)


class Cluster(Crew):
    """The workers of a Ray cluster.

    Attributes:
        cpus: CPUs of all nodes, each of which takes one worker.
    """

    def __init__(self, address: str):
        """Joins the cluster.

        Args:
            address: "auto" for the one that this machine belongs to, HOST:PORT, or ray://HOST:PORT.

        Raises:
            InputError: Ray is not installed, or there is no cluster.
        """
        self._ray = _import_ray()
        if not self._ray.is_initialized():
            try:
                self._ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"cluster {address}: cannot be joined ({first_line(error)}); start one with "
                    "`ray start --head` and name it HOST:PORT, or auto on one of its nodes"
                ) from error
        self.cpus = int(self._ray.cluster_resources().get("CPU", 0))
        self._actor = self._ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Simulator)

    def start(self, make: MakeEnvironment) -> "RayWorker":
        """See `Crew`; it starts as soon as a CPU is free."""
        return RayWorker(self._ray, self._actor.remote(make, package_versions(_PACKAGES)))

    def wait(self, workers: Sequence["RayWorker"], timeout: float | None) -> list["RayWorker"]:
        """See `Crew`."""
        by_reference = {worker.reply: worker for worker in workers}
        done, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=timeout)
        return [by_reference[reference] for reference in done]


class RayWorker(Worker):
    """A worker that is an actor."""

    def __init__(self, ray: Any, actor: Any):
        """Asks the actor for its first message."""
        super().__init__()
        self._ray, self._actor = ray, actor
        self._keeps: Replay | None = None
        self.reply: Any = actor.started.remote()

    def send(self, message: Request) -> None:
        """See `Worker`."""
        self._keeps = message if isinstance(message, Replay) else None
        self.reply = self._actor.exchange.remote(message)

    def receive(self) -> Reply:
        """See `Worker`."""
        try:
            message = self._ray.get(self.reply)
        except self._ray.exceptions.RayError as error:
            raise DeadWorkerError(first_line(error)) from error
        if isinstance(message, bytes):  # What a replay has written there.
            assert self._keeps is not None
            write_bytes(self._keeps.path, message)
            return Replayed()
        return message

    def stop(self) -> None:
        """See `Worker`."""
        self._ray.kill(self._actor)


class Simulator:
    """The actor: a worker in a thread, whose every reply is the result of a call."""

    def __init__(self, make: MakeEnvironment, versions: dict[str, str]):
        """Starts the worker.

        Args:
            make: makes environments.
            versions: those of the packages on the machine that asks.
        """
        self._versions = versions
        self._ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(theirs, make), daemon=True).start()

    def started(self) -> Reply:
        """The first message, if the versions are those of the machine that asks."""
        here = package_versions(_PACKAGES)
        for name in _PACKAGES:
            own, asked = here.get(name), self._versions.get(name)
            if own != asked:
                return Failure(
                    f"{socket.gethostname()} has {name} {own}, this machine {asked}: episodes "
                    "would not be comparable; install the same versions on all nodes",
                    user=True,
                )
        return self._ours.recv()

    def exchange(self, message: Request) -> Reply | bytes:
        """The reply to a message; of a `Replay`, the file that it wrote."""
        if not isinstance(message, Replay):
            self._ours.send(message)
            return self._ours.recv()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / message.path.name
            self._ours.send(Replay(message.keep, path))
            reply = self._ours.recv()
            return path.read_bytes() if isinstance(reply, Replayed) else reply


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError("--cluster needs Ray: pip install 'qvla-jax[cluster]'") from error
    return ray
