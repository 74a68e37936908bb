"""Builds an RLDS data set from LIBERO demonstrations (extra `rlds`: writing needs TensorFlow).

    python -m qvla_jax.data.libero.builder --demos demos/*.hdf5 --frames frames/ --out rlds/

The action is the demonstrator's clean label in LIBERO's raw convention (gripper -1 open, +1 close).

The held-out episodes depend only on the seed and the task: a sample and a full set built with one
seed hold out the same episodes.
"""

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qvla_jax.data.libero.frames import frames_path, load_rendered
from qvla_jax.data.libero.hdf5 import Demonstration, has_frames, read_demonstrations, read_frames
from qvla_jax.data.libero.recorded import Recording, encode_jpeg
from qvla_jax.data.libero.rlds_writer import episode_example, split_by_task, write_rlds
from qvla_jax.errors import DatasetError, QvlaError

Splits = Mapping[str, Sequence[Demonstration]]


@dataclass(frozen=True, kw_only=True)
class BuildArgs:
    """Options of the command."""

    demos: tuple[Path, ...]
    """HDF5 files of demonstrations. A demonstration found twice (same task and seed) is used once,
    from the first file that has its frames."""
    out: Path
    """Data directory; the set is written to <out>/<name>/<version>."""
    frames: tuple[Path, ...] = field(default_factory=tuple)
    """Folders of rendered frames, for demonstrations whose file has none."""
    name: str = "libero_spatial"
    """Name of the data set."""
    splits: Literal["train", "sample"] = "train"
    """train: splits "train" and "heldout". sample: "calibration" (a few of train) and "heldout"."""
    heldout: int = 1
    """Episodes of each task kept out of training."""
    calibration: int = 2
    """Episodes of each task in the calibration split of a sample."""
    seed: int = 0
    """Seed that chooses held-out and calibration episodes."""
    quality: int = 95
    """JPEG quality."""
    full_chroma: bool = True
    """Store colour at full resolution (4:4:4) rather than half (4:2:0)."""
    file_format: Literal["array_record", "tfrecord"] = "array_record"
    """array_record is read without TensorFlow."""


def choose_splits(demos: Iterable[Demonstration], args: BuildArgs) -> Splits:
    """Divides demonstrations into splits, task by task.

    Raises:
        DatasetError: a task has too few demonstrations.
    """
    sample = args.splits == "sample"
    first = "calibration" if sample else "train"
    chosen: dict[str, list[Demonstration]] = {first: [], "heldout": []}
    needed = args.heldout + (args.calibration if sample else 1)
    for rest, held in split_by_task(
        list(demos), seed=args.seed, heldout=args.heldout, needed=needed
    ):
        kept = rest[: args.calibration] if sample else rest
        chosen[first] += sorted(kept, key=lambda demo: (demo.seed or 0, demo.key))
        chosen["heldout"] += held
    return chosen


def build(args: BuildArgs) -> Path:
    """Writes the data set and returns its directory.

    Raises:
        DatasetError: demonstrations or frames are missing, or the directory exists already.
    """
    demos = _collect(args)
    return write_rlds(
        choose_splits(demos, args),
        functools.partial(_example, args=args),
        out=args.out,
        name=args.name,
        size=_frames_of(demos[0], args.frames)[0].shape[1],
        description="LIBERO demonstrations with the features of modified_libero_rlds. "
        f"Images are JPEG, quality {args.quality}.",
        file_format=args.file_format,
    )


def _example(demo: Demonstration, args: BuildArgs) -> dict[str, Any]:
    image, wrist = (
        [encode_jpeg(frame, quality=args.quality, full_chroma=args.full_chroma) for frame in view]
        for view in _frames_of(demo, args.frames)
    )
    recording = Recording(
        task=demo.task,
        instruction=demo.instruction,
        seed=-1 if demo.seed is None else demo.seed,
        success=bool(demo.rewards[-1] > 0),
        image=image,
        wrist_image=wrist,
        state=list(demo.proprio),
        joint_state=list(demo.joint_state),
        label=list(demo.actions.astype(np.float32)),
        executed=list(demo.actions_executed.astype(np.float32)),
    )
    return episode_example(
        recording,
        rewards=demo.rewards,
        source=f"{demo.file.name}:{demo.group}",
        policy="demonstrator",
        noise_sigma=np.nan if demo.noise_sigma is None else demo.noise_sigma,
    )


def _collect(args: BuildArgs) -> list[Demonstration]:
    """Reads all demonstrations; of duplicates, keeps the first with frames."""
    found: dict[str, Demonstration] = {}
    lacking: dict[str, Demonstration] = {}
    for path in args.demos:
        for demo in read_demonstrations(path):
            if demo.key in found:
                continue
            if _has_frames(demo, args.frames):
                found[demo.key] = demo
            else:
                lacking[demo.key] = demo
    missing = [demo for key, demo in lacking.items() if key not in found]
    if missing:
        raise DatasetError(
            f"{len(missing)} demonstrations have no frames, the first is {missing[0].key} of "
            f"{missing[0].file}; render them with python -m qvla_jax.data.libero.render"
        )
    if not found:
        raise DatasetError("no demonstrations given")
    return list(found.values())


def _has_frames(demo: Demonstration, folders: Sequence[Path]) -> bool:
    return has_frames(demo) or any(frames_path(folder, demo).is_file() for folder in folders)


def _frames_of(demo: Demonstration, folders: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    sources = chain([read_frames(demo)], (load_rendered(folder, demo) for folder in folders))
    frames = next((pair for pair in sources if pair is not None), None)
    if frames is None:
        raise DatasetError(f"{demo.file}:{demo.group}: no frames in the file nor in {folders}")
    for name, array in zip(("image", "wrist_image"), frames, strict=True):
        if len(array) != len(demo):
            raise DatasetError(f"{demo.key}: {len(array)} frames of {name} for {len(demo)} steps")
    return frames


def main() -> None:
    """Command line entry."""
    import tyro

    try:
        print(build(tyro.cli(BuildArgs, description=__doc__)))
    except QvlaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
