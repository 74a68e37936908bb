"""Builds an RLDS data set from LIBERO demonstrations (extra ``rlds``: writing needs TensorFlow).

    python -m qvla_jax.data.libero.builder --demos demos/*.hdf5 --frames frames/ --out rlds/

Features carry the names and types of the public modified_libero_rlds sets, so that whatever reads
those reads these. The action is the demonstrator's clean label in LIBERO's raw convention (gripper
-1 open, +1 close). ``episode_metadata`` says more than the public sets do: where an episode comes
from, and whether what was executed differed from the label.

Which episodes are held out depends on the seed and the task alone: a sample and a full set built
with one seed hold out the same episodes.
"""

import hashlib
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds

from qvla_jax.data.libero.frames import frames_path, load_rendered
from qvla_jax.data.libero.hdf5 import Demonstration, has_frames, read_demonstrations, read_frames
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
      DatasetError: A task has too few demonstrations.
    """
    tasks: dict[str, list[Demonstration]] = {}
    for demo in sorted(demos, key=lambda demo: (demo.task, demo.seed or 0, demo.key)):
        tasks.setdefault(demo.task, []).append(demo)
    needed = args.heldout + (args.calibration if args.splits == "sample" else 1)
    chosen: dict[str, list[Demonstration]] = {
        ("calibration" if args.splits == "sample" else "train"): [],
        "heldout": [],
    }
    for task, members in tasks.items():
        if len(members) < needed:
            raise DatasetError(
                f"task {task}: {len(members)} demonstrations, at least {needed} needed"
            )
        # Seeded by the task's name: a task's draw does not depend on which other tasks there are.
        words = np.frombuffer(hashlib.sha256(task.encode()).digest(), np.uint32)
        order = np.random.default_rng([args.seed, *words.tolist()]).permutation(len(members))
        held, rest = order[: args.heldout], order[args.heldout :]
        if args.splits == "sample":
            rest = rest[: args.calibration]
            chosen["calibration"] += [members[i] for i in sorted(rest)]
        else:
            chosen["train"] += [members[i] for i in sorted(rest)]
        chosen["heldout"] += [members[i] for i in sorted(held)]
    return chosen


def build(args: BuildArgs) -> Path:
    """Writes the data set and returns its directory.

    Raises:
      DatasetError: Demonstrations or frames are missing, or the directory exists already.
    """
    demos = _collect(args)
    builder = LiberoRlds(
        name=args.name,
        splits=choose_splits(demos, args),
        frames=args.frames,
        quality=args.quality,
        full_chroma=args.full_chroma,
        size=_frames_of(demos[0], args.frames)[0].shape[1],
        data_dir=args.out,
        file_format=args.file_format,
    )
    folder = Path(builder.data_dir)
    if folder.exists():
        raise DatasetError(f"{folder}: exists already; remove it or choose another --out or --name")
    # TFDS writes to an incomplete directory beside it and renames that at the end. It also makes a
    # folder for downloads, though there are none.
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)
    return folder


class LiberoRlds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder over chosen demonstrations."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    # Nothing is downloaded, so there are no checksums for TFDS to look for beside this module.
    url_infos = {}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        *,
        name: str,
        splits: Splits,
        frames: Sequence[Path],
        quality: int,
        full_chroma: bool,
        size: int,
        **kwargs: Any,
    ):
        """See `BuildArgs` for the arguments; ``size`` is the frames' height and width."""
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._splits, self._frames, self._size = splits, tuple(frames), size
        self._quality, self._subsampling = quality, 0 if full_chroma else 2
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        image = features.Image(
            shape=(self._size, self._size, 3), dtype=np.uint8, encoding_format="jpeg"
        )
        step = {
            "observation": {
                "image": image,
                "wrist_image": image,
                "state": features.Tensor(
                    shape=(8,),
                    dtype=np.float32,
                    doc="Gripper position (m), axis-angle (rad), finger positions (m).",
                ),
                "joint_state": features.Tensor(shape=(7,), dtype=np.float32, doc="rad"),
            },
            "action": features.Tensor(
                shape=(7,),
                dtype=np.float32,
                doc="Change of position, of rotation, and gripper (-1 open, +1 close).",
            ),
            "discount": features.Scalar(np.float32),
            "reward": features.Scalar(np.float32),
            "is_first": features.Scalar(np.bool_),
            "is_last": features.Scalar(np.bool_),
            "is_terminal": features.Scalar(np.bool_),
            "language_instruction": features.Text(),
        }
        metadata = {
            "file_path": features.Text(doc="HDF5 file and group of the demonstration."),
            "task": features.Text(),
            "seed": features.Scalar(np.int64, doc="Seed of the start state; -1 if unknown."),
            "noise_sigma": features.Scalar(
                np.float32, doc="Noise on what was executed; NaN: unknown."
            ),
            "label_differs": features.Scalar(
                np.bool_, doc="Whether the executed actions differ from the labels in action."
            ),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="LIBERO demonstrations with the features of modified_libero_rlds. "
            f"Images are JPEG, quality {self._quality}.",
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": metadata}
            ),
            # Written in the order given: tasks by name, episodes by seed.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager
        return {name: self._generate_examples(demos) for name, demos in self._splits.items()}

    def _generate_examples(self, demos: Sequence[Demonstration]) -> Iterator[tuple[int, Any]]:
        for index, demo in enumerate(demos):
            yield index, self._episode(demo)

    def _episode(self, demo: Demonstration) -> dict[str, Any]:
        image, wrist = _frames_of(demo, self._frames)
        last = len(demo) - 1
        steps = [
            {
                "observation": {
                    "image": self._encode(image[t]),
                    "wrist_image": self._encode(wrist[t]),
                    "state": demo.proprio[t],
                    "joint_state": demo.joint_state[t],
                },
                "action": demo.actions[t].astype(np.float32),
                "discount": 1.0,
                "reward": demo.rewards[t],
                "is_first": t == 0,
                "is_last": t == last,
                "is_terminal": t == last,
                "language_instruction": demo.instruction,
            }
            for t in range(len(demo))
        ]
        metadata = {
            "file_path": f"{demo.file.name}:{demo.group}",
            "task": demo.task,
            "seed": -1 if demo.seed is None else demo.seed,
            "noise_sigma": np.nan if demo.noise_sigma is None else demo.noise_sigma,
            "label_differs": not np.array_equal(demo.actions, demo.actions_executed),
        }
        return {"steps": steps, "episode_metadata": metadata}

    def _encode(self, image: np.ndarray) -> bytes:
        # Encoded here rather than by TFDS, which does not let the quality be chosen.
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(
            buffer, "JPEG", quality=self._quality, subsampling=self._subsampling, optimize=True
        )
        return buffer.getvalue()


def _collect(args: BuildArgs) -> list[Demonstration]:
    """Reads all demonstrations; of doubles, the first with frames."""
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
    # TFDS writes the class's module into the data set, and "__main__" would say nothing.
    from qvla_jax.data.libero import builder

    builder.main()
