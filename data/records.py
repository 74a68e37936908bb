"""The records of one split of an RLDS data set, from either file format.

``array_record`` is read without TensorFlow. TFRecord needs it (extra ``rlds``); it is imported when
such a set is read, and never sees an accelerator. Images stay encoded.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.errors import DatasetError

INFO_FILE: Final = "dataset_info.json"
_SAMPLE_BYTES: Final = 1 << 16


class SplitRecords:
    """The records of one split.

    Attributes:
      path: The directory of the data set's version, ``split`` the split's name.
      features: The features of a step by their path, such as "observation/image".
      num_episodes: Number of records.
    """

    def __init__(self, path: Path, split: str):
        """Reads the description of the data set.

        Raises:
          DatasetError: It cannot be read, there is no such split, or it is not RLDS.
        """
        import tensorflow_datasets as tfds

        self.path, self.split = path, split
        try:
            # TFDS declares most of what is used here as optional or not at all.
            self._builder: Any = tfds.builder_from_directory(path)
        except Exception as error:
            raise DatasetError(f"{path}: unreadable data set description ({error})") from error
        info = self._builder.info
        if split not in info.splits:
            raise DatasetError(
                f"{path}: no split {split!r}; it has {', '.join(sorted(info.splits)) or 'none'}"
            )
        if "steps" not in info.features:
            raise DatasetError(
                f"{path}: not an RLDS data set: no 'steps' among {', '.join(info.features)}"
            )
        self.features = _flatten(info.features["steps"].feature)
        self.name, self.version = info.name, str(info.version)
        self.num_episodes: int = info.splits[split].num_examples

    @property
    def files(self) -> list[Path]:
        """The files of the split, sorted."""
        return sorted(Path(name) for name in self._builder.info.splits[self.split].filepaths)

    def file_hashes(self) -> dict[str, str]:
        """The sha256 of each file of the split, by name: its whole content is read."""
        hashes = {}
        for path in self.files:
            self._check_file(path)
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        digest = hashlib.sha256(self.split.encode())
        for name in (INFO_FILE, "features.json"):
            path = self.path / name
            digest.update(path.read_bytes() if path.exists() else b"")
        for path in self.files:
            self._check_file(path)
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def examples(self, ids: Int64[NpArray, " e"]) -> Iterator[Mapping[str, Any]]:
        """Yields records in the order of ``ids``, their steps as a list, images as stored.

        TFRecord has no random access: out of order, records that are due later are held in memory.

        Raises:
          DatasetError: A file is missing or damaged.
        """
        for path in self.files:
            self._check_file(path)
        random_access = self._builder.info.file_format.value == "array_record"
        read = self._read_array_record if random_access else self._read_tfrecord
        try:
            yield from read(ids)
        except DatasetError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DatasetError(
                f"{self.path}: split {self.split!r} cannot be read; a file is truncated or "
                f"damaged ({first}). Copy or build the data set again."
            ) from error

    def _check_file(self, path: Path) -> None:
        if not path.is_file():
            raise DatasetError(f"{path}: missing; split {self.split!r} needs it")

    def _decoders(self) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        nested: dict[str, Any] = {}
        for key, feature in self.features.items():
            if isinstance(feature, tfds.features.Image):
                *parents, leaf = key.split("/")
                node = nested
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = tfds.decode.SkipDecoding()
        return {"steps": nested}

    def _read_array_record(self, ids: Int64[NpArray, " e"]) -> Iterator[Any]:
        source = self._builder.as_data_source(split=self.split, decoders=self._decoders())
        for index in ids.tolist():
            example = source[index]
            yield {**example, "steps": list(example["steps"])}

    def _read_tfrecord(self, ids: Int64[NpArray, " e"]) -> Iterator[Any]:
        import tensorflow_datasets as tfds

        _import_tensorflow()
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        wanted = Counter(ids.tolist())
        if not wanted:
            return
        dataset = self._builder.as_dataset(
            split=self.split, decoders=self._decoders(), read_config=config, shuffle_files=False
        )
        examples = enumerate(tfds.as_numpy(dataset.take(max(wanted) + 1)))
        held: dict[int, Any] = {}
        for due in ids.tolist():
            while due not in held:
                following: tuple[int, Any] | None = next(examples, None)
                if following is None:
                    raise DatasetError(f"{self.path}: {self.split!r} ends before episode {due}")
                index, example = following
                if index in wanted:
                    held[index] = {**example, "steps": list(example["steps"])}
            yield held[due]
            wanted[due] -= 1
            if not wanted[due]:
                del held[due]


def _import_tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise DatasetError(
            "this data set's format (TFRecord) needs TensorFlow: pip install 'qvla-jax[rlds]', or "
            "convert it to array_record"
        ) from error
    # TensorFlow would otherwise take all memory of the accelerators that JAX runs on.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def _flatten(features: Any, prefix: str = "") -> dict[str, Any]:
    if not hasattr(features, "items"):  # FeaturesDict is no Mapping.
        return {prefix: features}
    flat: dict[str, Any] = {}
    for key, feature in features.items():
        flat |= _flatten(feature, f"{prefix}/{key}" if prefix else key)
    return flat
