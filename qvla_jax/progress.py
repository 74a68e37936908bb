"""Progress bars: stage, items, rate and time left.

Library functions take a `Progress` and call `progress(stage, done, total)` from time to time; they
know nothing about terminals. The command line passes a `ProgressBars`, which draws bars if stderr
is a terminal and is silent otherwise.
"""

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

Item = TypeVar("Item")


class Progress(Protocol):
    """What long-running functions report to."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Says that `done` of `total` items of `stage` are finished."""
        ...


def no_progress(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing; the default of library functions."""


def track(items: Iterable[Item], total: int, stage: str, progress: Progress) -> Iterator[Item]:
    """Yields `items`, reporting each to `progress` when the consumer comes back for the next."""
    progress(stage, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(stage, done, total)


def prefixed(progress: Progress, name: str) -> Progress:
    """Puts a name in front of the stages that are reported."""

    def call(stage: str, done: int, total: int) -> None:
        progress(stage if stage == name else f"{name}: {stage}", done, total)

    return call


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.3g}/s", style="progress.data.speed")


class ProgressBars:
    """Draws one bar for each stage, while used as a context manager; is itself a `Progress`.

    Args:
        enabled: True or False decide; None shows bars only if stderr is a terminal.
    """

    def __init__(self, *, enabled: bool | None = None) -> None:
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of `stage`, creating it if necessary."""
        if stage not in self._tasks:
            self._tasks[stage] = self._rich.add_task(stage, total=total)
        self._rich.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> Self:
        """Starts drawing."""
        if not self._rich.disable:
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops drawing and leaves the bars as they are."""
        if not self._rich.disable:  # before 14.3 Rich also ends bars that it did not draw
            self._rich.stop()
