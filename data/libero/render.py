"""Renders the frames of demonstrations that were stored as simulator states.

    python -m qvla_jax.data.libero.render --states states.hdf5 --out frames/

Each demonstration becomes one file, `<out>/<task>/seed_<n>.npz`, written atomically: a killed run
continues where it stopped. Needs the `libero` extra.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvla_jax.data.libero.frames import is_rendered, save_rendered
from qvla_jax.data.libero.hdf5 import Demonstration, read_demonstrations
from qvla_jax.errors import QvlaError

if TYPE_CHECKING:
    from qvla_jax.data.libero.simulator import TaskScene


@dataclass(frozen=True, kw_only=True)
class RenderArgs:
    """Options of the command."""

    states: tuple[Path, ...]
    """HDF5 files whose demonstrations are rendered."""
    out: Path
    """Folder of the frames."""
    skip: tuple[Path, ...] = field(default_factory=tuple)
    """HDF5 files whose demonstrations have frames already (same task and seed) and are left out."""
    suite: str = "libero_spatial"
    """LIBERO suite of the tasks."""
    size: int = 128
    """Height and width in pixels."""
    supersample: int = 2
    """Each pixel is the mean of this number squared rendered ones."""
    workers: int = 2
    """Processes; each has a simulator of its own."""


def render(args: RenderArgs) -> int:
    """Renders what is missing and returns the number of demonstrations rendered."""
    done = {demo.key for path in args.skip for demo in read_demonstrations(path)}
    todo = [
        demo
        for path in args.states
        for demo in read_demonstrations(path)
        if demo.key not in done and not is_rendered(args.out, demo)
    ]
    jobs = [list(demos) for _, demos in groupby(todo, key=lambda demo: demo.bddl_file)]
    if not jobs:
        return 0
    # A fresh interpreter for each worker: OpenGL contexts do not survive a fork.
    context = multiprocessing.get_context("spawn")
    start, count, frames = time.monotonic(), 0, 0
    with ProcessPoolExecutor(min(args.workers, len(jobs)), mp_context=context) as pool:
        for future in as_completed([pool.submit(_render_task, job, args) for job in jobs]):
            demos, steps = future.result()
            count, frames = count + demos, frames + steps
            print(
                f"{count}/{len(todo)} demonstrations, {frames} steps, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    return count


def _render_task(demos: Sequence[Demonstration], args: RenderArgs) -> tuple[int, int]:
    from qvla_jax.data.libero.simulator import TaskScene

    with TaskScene(
        args.suite, demos[0].bddl_file, size=args.size, supersample=args.supersample
    ) as scene:
        for demo in demos:
            pictures = list(_pictures(scene, demo))
            image, wrist_image = (np.stack(views) for views in zip(*pictures, strict=True))
            save_rendered(args.out, demo, image, wrist_image)
    return len(demos), sum(len(demo) for demo in demos)


def _pictures(scene: "TaskScene", demo: Demonstration) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for state in demo.states:
        scene.restore(state, demo.fixtures)
        yield scene.render("image"), scene.render("wrist_image")


def main() -> None:
    """Command line entry."""
    import tyro

    try:
        render(tyro.cli(RenderArgs, description=__doc__))
    except QvlaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
