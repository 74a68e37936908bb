"""Small sets in LIBERO's layout, written record by record, so that any part of one can be wrong.

TFDS serializes the records and the files are written here: no builder runs, and for array_record no
TensorFlow either, which takes milliseconds. A step's features and values are named by their paths.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

SIZE = 6
NAME = "libero_spatial"
IMAGE, WRIST = "observation/image", "observation/wrist_image"
STATE, ACTION, TEXT = "observation/state", "action", "language_instruction"

Step = dict[str, Any]


def file_of(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int) -> np.ndarray:
    """u8[SIZE, SIZE, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def features() -> dict[str, Any]:
    """What LIBERO's specification takes."""
    f = tfds.features
    return {
        IMAGE: f.Image(shape=(SIZE, SIZE, 3)),
        WRIST: f.Image(shape=(SIZE, SIZE, 3)),
        STATE: f.Tensor(shape=(8,), dtype=np.float32),
        ACTION: f.Tensor(shape=(7,), dtype=np.float32),
        TEXT: f.Text(),
    }


def episodes(lengths: Sequence[int] = (3, 4)) -> list[list[Step]]:
    """Steps of random values, the same at each call; the gripper opens and closes."""
    rng = np.random.default_rng(0)
    return [
        [
            {
                IMAGE: file_of(picture(100 * number + t)),
                WRIST: file_of(picture(100 * number + t + 50)),
                STATE: rng.normal(size=8).astype(np.float32),
                ACTION: np.append(rng.uniform(-1, 1, 6), (-1.0) ** t).astype(np.float32),
                TEXT: f"pick up object {number}",
            }
            for t in range(length)
        ]
        for number, length in enumerate(lengths)
    ]


def write(
    folder: Path,
    steps: Sequence[Sequence[Step]] | None = None,
    *,
    changed: Mapping[str, Any] | None = None,
    file_format: str = "array_record",
    files: int = 1,
    description: Mapping[str, Any] | None = None,
    shard_lengths: Any = None,
) -> Path:
    """Writes a split "train".

    Args:
      folder: Directory of the version; made.
      steps: Of each episode, by default `episodes()`.
      changed: Features other than those of `features()`, or beside them.
      file_format: array_record or tfrecord.
      files: Number of files.
      description: Entries of dataset_info.json, in place of the right ones.
      shard_lengths: What the description says of the episodes in each file, if not the truth.
    """
    steps = episodes() if steps is None else steps
    folder.mkdir(parents=True)
    step = _nested({**features(), **(changed or {})})
    described = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
    described.save_config(epath.Path(folder))
    records = [
        described.serialize_example({"steps": [_nested(each) for each in episode]})
        for episode in steps
    ]
    parts = np.array_split(np.arange(len(records)), files)
    for number, part in enumerate(parts):
        path = folder / f"{NAME}-train.{file_format}-{number:05d}-of-{files:05d}"
        _write_file(path, [records[place] for place in part], file_format)
    lengths = [str(len(part)) for part in parts] if shard_lengths is None else shard_lengths
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "shardLengths": lengths,
        "numBytes": "1",
    }
    info = {"name": NAME, "version": "1.0.0", "fileFormat": file_format, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps({**info, **(description or {})}))
    return folder


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _write_file(path: Path, records: Sequence[bytes], file_format: str) -> None:
    if file_format == "tfrecord":
        import tensorflow as tf

        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
