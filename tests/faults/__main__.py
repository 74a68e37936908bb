"""Kills stages at random moments: `make faults`, or `PYTHONPATH=tests python -m faults`.

Each attempt is a fork of this process that is sent SIGKILL; the next one goes on in its folder.
After every kill each file under its final name must be whole and no finished item lost or changed;
a run that was killed often must end in the result of one that was not.
"""

import argparse
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import jax

from .disk import disk
from .stages import STAGES, Stage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a stage's name")
    arguments = parser.parse_args()
    # Nothing has started JAX's threads yet when these stages fork.
    warnings.filterwarnings("ignore", message="os.fork.. was called")
    jax.config.update("jax_platforms", "cpu")
    if arguments.only in "disk":
        if os.geteuid():
            print("disk: not checked: mounting a small file system takes root")
        else:
            with tempfile.TemporaryDirectory() as folder:
                print(disk(Path(folder) / "disk"), flush=True)
    for make in STAGES:
        if arguments.only in make.__name__:
            with tempfile.TemporaryDirectory() as folder:
                print(_torture(make(), arguments.kills, Path(folder), arguments.seed), flush=True)
    return 0


def _torture(stage: Stage, kills: int, folder: Path, seed: int) -> str:
    rng = random.Random(f"{seed} {stage.name}")
    _must_end(_start(stage, folder / "whole"))
    expected = stage.result(folder / "whole")
    # Programs are compiled by now, and lie beside the folders: this is how long later runs take.
    start = time.monotonic()
    _must_end(_start(stage, folder / "again"))
    seconds = time.monotonic() - start
    if (again := stage.result(folder / "again")) != expected:
        raise SystemExit(f"{stage.name}: two processes differ: {again}, {expected}")
    killed = runs = lost = 0
    while killed < kills:
        runs += 1
        current = folder / f"run-{runs}"
        done: dict[str, str] = {}
        while killed < kills:
            child = _start(stage, current)
            if not _kill(child, rng.uniform(0, seconds)):
                break
            killed += 1
            stage.check(current)
            now = stage.done(current)
            lost += sum(now.get(name) != value for name, value in done.items())
            done = now
        _must_end(_start(stage, current))
        found = stage.result(current)
        if found != expected:
            raise SystemExit(f"{stage.name}: {found} after kills, {expected} without")
        if lost:
            raise SystemExit(f"{stage.name}: {lost} finished items were lost or made again")
    leftovers = sum(1 for _ in folder.rglob(".*.tmp*"))
    return (
        f"{stage.name}: {killed} kills in {runs} runs of {seconds:.1f} s, no damaged file, "
        f"no finished item lost or repeated, same result; {leftovers} temporary files were left"
    )


def _start(stage: Stage, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        stage.run(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(status)


def _must_end(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a run that was not killed ended with status {status}")


def _kill(child: int, after: float) -> bool:
    """Whether the child was killed; False if it had finished."""
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise SystemExit(f"a resumed run ended with status {status}")
    return False


if __name__ == "__main__":
    raise SystemExit(main())
