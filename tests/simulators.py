"""Simulators in threads in place of processes: they start at once, and none outlives its run."""

import multiprocessing
import threading

from qvla_jax.evaluation.workers import MakeEnvironment, Processes, ProcessWorker, serve


class _Thread:
    """What `ProcessWorker` asks of a process."""

    exitcode = None

    def __init__(self, thread: threading.Thread):
        self.join = thread.join

    def terminate(self) -> None:
        """The closed connection ends the thread."""


class Threads(Processes):
    """In place of `Processes`."""

    def start(self, make: MakeEnvironment) -> ProcessWorker:
        ours, theirs = multiprocessing.Pipe()
        thread = threading.Thread(target=serve, args=(theirs, make), daemon=True)
        thread.start()
        return ProcessWorker(_Thread(thread), ours)
