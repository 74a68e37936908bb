"""The records of one split of an RLDS data set, from either file format.

``array_record`` is read without TensorFlow. TFRecord needs it (extra ``rlds``); it is imported when
such a set is read, and never sees an accelerator. Images stay encoded. Only the files that hold the
records asked for are opened.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from etils import epath

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.errors import DatasetError

INFO_FILE: Final = "dataset_info.json"
# Where our writer says which specification reads the data set.
METADATA_FILE: Final = "metadata.json"
SPEC_KEY: Final = "spec"
_SAMPLE_BYTES: Final = 1 << 16
_BLOCK_BYTES: Final = 1 << 22


class SplitRecords:
    """The records of one split.

    Attributes:
      path: The directory of the data set's version, ``split`` the split's name.
      features: The features of a step by their path, such as "observation/image".
      num_episodes: Number of records.
    """

    def __init__(self, path: epath.Path, split: str):
        """Reads the description of the data set.

        Raises:
          DatasetError: It cannot be read, there is no such split, or it is not RLDS.
        """
        self.path, self.split = path, split
        self._builder = _builder(path)
        info = self._builder.info
        if split not in info.splits:
            raise DatasetError(
                f"{path}: no split {split!r}; it has {', '.join(sorted(info.splits)) or 'none'}"
            )
        if "steps" not in info.features:
            raise DatasetError(
                f"{path}: not an RLDS data set: no 'steps' among {', '.join(info.features)}"
            )
        # A key may hold slashes itself, so that paths cannot be split at them.
        self._keys, self.features = _flatten(info.features["steps"].feature)
        self.name, self.version = info.name, str(info.version)
        self.num_episodes: int = info.splits[split].num_examples

    def values(self, steps: Sequence[Mapping[str, Any]], path: str) -> list[Any]:
        """The values of a feature in every step of a record."""
        keys = self._keys[path]
        return [functools.reduce(lambda node, key: node[key], keys, step) for step in steps]

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of a step's features by their path."""
        return {path: tuple(feature.shape) for path, feature in self.features.items()}

    def spec_name(self) -> str | None:
        """The specification that the data set's writer named, if it did."""
        path = self.path / METADATA_FILE
        try:
            return json.loads(path.read_text()).get(SPEC_KEY) if path.exists() else None
        except (ValueError, AttributeError):
            return None

    @functools.cached_property
    def files(self) -> list[epath.Path]:
        """The files of the split, in the order of their records."""
        return [epath.Path(name) for name in self._builder.info.splits[self.split].filepaths]

    @functools.cached_property
    def file_starts(self) -> Int64[NpArray, " files"]:
        """Id of the first record of each file."""
        lengths = self._builder.info.splits[self.split].shard_lengths
        return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

    def files_of(self, ids: Int64[NpArray, " e"]) -> list[epath.Path]:
        """The files that hold some records."""
        places = np.searchsorted(self.file_starts, np.unique(ids), side="right") - 1
        return [self.files[place] for place in np.unique(places).tolist()]

    def file_hashes(self, ids: Int64[NpArray, " e"]) -> dict[str, str]:
        """The sha256 of each file that holds some of the records, by name."""
        hashes = {}
        for path in self.files_of(ids):
            self._check_file(path)
            with path.open("rb") as file:
                hashes[path.name] = _digest(file)
        return hashes

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        digest = hashlib.sha256(self.split.encode())
        for name in (INFO_FILE, "features.json"):
            path = self.path / name
            digest.update(path.read_bytes() if path.exists() else b"")
        for path in self.files:
            self._check_file(path)
            size = path.stat().length
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
        for path in self.files_of(ids):
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

    def _check_file(self, path: epath.Path) -> None:
        if not path.exists():
            raise DatasetError(f"{path}: missing; split {self.split!r} needs it")

    def _decoders(self) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        nested: dict[str, Any] = {}
        for path, feature in self.features.items():
            if isinstance(feature, tfds.features.Image):
                *parents, leaf = self._keys[path]
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
        _import_tensorflow()
        wanted = Counter(ids.tolist())
        examples = self._in_order(np.unique(ids))
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

    def _in_order(self, ids: Int64[NpArray, " e"]) -> Iterator[tuple[int, Any]]:
        """Records in ascending order, of each file from the first to the last that is wanted."""
        import tensorflow_datasets as tfds

        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        places = np.searchsorted(self.file_starts, ids, side="right")
        for place in np.unique(places).tolist():
            first, last = (int(ids[places == place][end]) for end in (0, -1))
            part = tfds.core.ReadInstruction(self.split, from_=first, to=last + 1, unit="abs")
            dataset = self._builder.as_dataset(
                split=part, decoders=self._decoders(), read_config=config, shuffle_files=False
            )
            yield from enumerate(tfds.as_numpy(dataset), start=first)


def split_names(path: epath.Path) -> list[str]:
    """The splits of the data set at ``path``.

    Raises:
      DatasetError: Its description cannot be read.
    """
    return sorted(_builder(path).info.splits)


def _builder(path: epath.Path) -> Any:
    """TFDS declares most of what is used here as optional or not at all, hence Any."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(str(path))
    except Exception as error:
        raise DatasetError(f"{path}: unreadable data set description ({error})") from error


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


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _flatten(features: Any) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    """Keys on the way to each feature, and the features, by their paths."""
    keys: dict[str, tuple[str, ...]] = {}
    flat: dict[str, Any] = {}

    def visit(node: Any, above: tuple[str, ...]) -> None:
        if hasattr(node, "items"):  # FeaturesDict is no Mapping.
            for key, below in node.items():
                visit(below, (*above, key))
        else:
            path = "/".join(above)
            keys[path], flat[path] = above, node

    visit(features, ())
    return keys, flat
