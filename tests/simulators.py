"""Simulators in threads in place of processes: they start at once, and none outlives its run."""

import multiprocessing
import threading

from qvla_jax.evaluation.workers import MakeEnvironment, Worker, serve


class _Thread:
    """What `Worker` asks of a process."""

    exitcode = None

    def __init__(self, thread: threading.Thread):
        self.join = thread.join

    def terminate(self) -> None:
        """The closed connection ends the thread."""


def start_thread(make: MakeEnvironment) -> Worker:
    """In place of `start_worker`."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, make), daemon=True)
    thread.start()
    return Worker(_Thread(thread), ours)
