"""Writes RLDS data sets with the features of the public modified_libero_rlds (extra `rlds`).

Readers of those read these. `episode_metadata` adds where an episode comes from, who acted in it,
whether it succeeded, and whether the executed actions differ from the labels.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from qvla_jax.data.libero.recorded import Recording
from qvla_jax.data.records import SPEC_KEY
from qvla_jax.errors import DatasetError


class Identified(Protocol):
    """What assigning an episode to a split requires."""

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def seed(self) -> int | None:
        """Seed of the start state."""
        ...

    @property
    def key(self) -> str:
        """Name unique among the episodes."""
        ...


Item = TypeVar("Item", bound=Identified)


def split_by_task(
    items: Sequence[Item], *, seed: int, heldout: int, needed: int
) -> Iterator[tuple[list[Item], list[Item]]]:
    """Yields the remaining and the held-out episodes of each task, each in a seeded order.

    The held-out episodes depend only on the seed and the task.

    Args:
        items: episodes of any tasks.
        seed: seed of the choice.
        heldout: episodes of each task to hold out.
        needed: number of episodes that a task must have.

    Raises:
        DatasetError: a task has too few episodes.
    """
    tasks: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: (item.task, item.seed or 0, item.key)):
        tasks.setdefault(item.task, []).append(item)
    for task, members in tasks.items():
        if len(members) < needed:
            raise DatasetError(
                f"task {task}: {len(members)} demonstrations, at least {needed} needed"
            )
        # Seeded by the task's name: a task's draw does not depend on which other tasks there are.
        words = np.frombuffer(hashlib.sha256(task.encode()).digest(), np.uint32)
        order = np.random.default_rng([seed, *words.tolist()]).permutation(len(members))
        held, rest = order[:heldout], order[heldout:]
        yield [members[i] for i in rest], [members[i] for i in sorted(held)]


def episode_example(
    recording: Recording,
    *,
    rewards: np.ndarray,
    source: str,
    policy: str,
    noise_sigma: float,
) -> dict[str, Any]:
    """An episode in the writer's form; `label` becomes the action."""
    last = len(recording) - 1
    steps = [
        {
            "observation": {
                "image": recording.image[t],
                "wrist_image": recording.wrist_image[t],
                "state": recording.state[t],
                "joint_state": recording.joint_state[t],
            },
            "action": recording.label[t],
            "discount": 1.0,
            "reward": rewards[t],
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last,
            "language_instruction": recording.instruction,
        }
        for t in range(len(recording))
    ]
    metadata = {
        "file_path": source,
        "task": recording.task,
        "seed": recording.seed,
        "policy": policy,
        "success": recording.success,
        "noise_sigma": noise_sigma,
        "label_differs": not np.array_equal(recording.label, recording.executed),
    }
    return {"steps": steps, "episode_metadata": metadata}


def write_rlds(
    splits: Mapping[str, Sequence[Any]],
    example: Callable[[Any], dict[str, Any]],
    *,
    out: Path,
    name: str,
    size: int,
    description: str,
    file_format: Literal["array_record", "tfrecord"] = "array_record",
) -> Path:
    """Writes a data set and returns its directory.

    Args:
        splits: split -> its episodes, in the order in which they are written.
        example: turns an episode into the form of `episode_example`; called while writing.
        out: data directory; the set is written to <out>/<name>/<version>.
        name: name of the data set.
        size: height and width of the pictures.
        description: description of the data set.
        file_format: array_record is read without TensorFlow.

    Raises:
        DatasetError: the directory exists already.
    """
    builder = LiberoRlds(
        name=name,
        splits=splits,
        example=example,
        size=size,
        description=description,
        data_dir=out,
        file_format=file_format,
    )
    folder = Path(builder.data_dir)
    if folder.exists():
        raise DatasetError(f"{folder}: exists already; remove it or choose another --out or --name")
    # TFDS writes to a temporary directory next to it and renames that at the end. It also makes a
    # folder for downloads, although there are none.
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)
    return folder


class LiberoRlds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder over chosen episodes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    # Nothing is downloaded, so there are no checksums for TFDS to look for next to this module.
    url_infos = {}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, Sequence[Any]],
        example: Callable[[Any], dict[str, Any]],
        size: int,
        description: str,
        **kwargs: Any,
    ):
        """See `write_rlds`."""
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._splits, self._example = splits, example
        self._size, self._description = size, description
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
            "file_path": features.Text(doc="Where the episode comes from."),
            "task": features.Text(),
            "seed": features.Scalar(np.int64, doc="Seed of the start state; -1 if unknown."),
            "policy": features.Text(doc="Who acted: a demonstrator, the expert, or a policy."),
            "success": features.Scalar(np.bool_, doc="Whether the last action solved the task."),
            "noise_sigma": features.Scalar(
                np.float32, doc="Noise on what was executed; NaN: unknown."
            ),
            "label_differs": features.Scalar(
                np.bool_, doc="Whether the executed actions differ from the labels in action."
            ),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": metadata}
            ),
            # Whatever its name, the data set is read like LIBERO's.
            metadata=tfds.core.MetadataDict({SPEC_KEY: "libero"}),
            # Written in the order given: tasks by name, episodes by seed.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager
        return {name: self._generate_examples(items) for name, items in self._splits.items()}

    def _generate_examples(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, self._example(item)
