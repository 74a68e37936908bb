"""Where the time of a command goes: seconds of every stage, and how many of them XLA compiled."""

import dataclasses
import os
import time
from types import TracebackType
from typing import Any, Final, Self

import jax

from qvla_jax.progress import Progress

# What JAX calls compiling a program, or reading it from the persistent cache.
_COMPILED: Final = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class StageSeconds:
    """Seconds of one stage.

    Attributes:
        stage: As it is reported to a `Progress`.
        seconds: Wall clock.
        compiling: Of these, XLA's compiler.
        cpu: Of all cores and threads, user and system.
    """

    stage: str
    seconds: float = 0.0
    compiling: float = 0.0
    cpu: float = 0.0


class StageTimes:
    """A `Progress` that measures the stages reported to it, and passes them on.

    A stage lasts from its first report to the next stage's, so that the stages add up to the whole
    time inside of the context. One that is reported again goes on.

    >>> from qvla_jax.progress import no_progress
    >>> with StageTimes(no_progress, first="load") as times:
    ...     times("measure", 0, 1)
    ...     times("measure", 1, 1)
    >>> [stage.stage for stage in times.stages]
    ['load', 'measure']
    """

    def __init__(self, progress: Progress, *, first: str):
        """Begins with a stage.

        Args:
            progress: Gets every report.
            first: The stage before the first report.
        """
        self._progress = progress
        self._stages = {first: StageSeconds(first)}
        self._now = self._stages[first]
        self._clocks = _clocks()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Says that `done` of `total` items of `stage` are finished."""
        if stage != self._now.stage:
            self._read()
            self._now = self._stages.setdefault(stage, StageSeconds(stage))
        self._progress(stage, done, total)

    def __enter__(self) -> Self:
        """Starts the clocks."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._clocks = _clocks()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops them."""
        self._read()
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @property
    def stages(self) -> list[StageSeconds]:
        """All stages in the order in which they began, up to now while the clocks run."""
        return list(self._stages.values())

    def until_now(self) -> list[StageSeconds]:
        """Copies of the stages, read now."""
        self._read()
        return [dataclasses.replace(stage) for stage in self.stages]

    def _read(self) -> None:
        wall, cpu = _clocks()
        self._now.seconds += wall - self._clocks[0]
        self._now.cpu += cpu - self._clocks[1]
        self._clocks = wall, cpu

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self._now.compiling += duration_secs


def _clocks() -> tuple[float, float]:
    used = os.times()
    return time.perf_counter(), used.user + used.system
