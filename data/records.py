"""The records of one split of an RLDS data set, from either file format.

`array_record` is read without TensorFlow. TFRecord needs it (extra `rlds`); it is imported when
such a set is read, and never sees an accelerator. Images stay encoded. Only the files that hold the
records asked for are opened.
"""

import functools
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from etils import epath

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.data.hashing import digest, sample
from qvla_jax.data.location import DESCRIPTIONS, RLDS
from qvla_jax.data.open_x.features import Feature
from qvla_jax.errors import DatasetError, first_line
from qvla_jax.remote.folder import ensure

INFO_FILE: Final = DESCRIPTIONS[RLDS]
# Where our writer says which specification reads the data set.
METADATA_FILE: Final = "metadata.json"
SPEC_KEY: Final = "spec"
# The name of a shard: prefix, number, and number of shards.
_SHARD: Final = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})")
# A TFRecord is its length (u64), the length's checksum (u32), the bytes, and their checksum (u32).
_TFRECORD_HEAD: Final = struct.Struct("<QI")
_TFRECORD_TAIL: Final = 4
_BUILD_AGAIN: Final = (
    "build the data set again, or count its episodes with tfds.folder_dataset.write_metadata"
)


class SplitRecords:
    """The records of one split.

    Attributes:
        path: the directory of the data set's version, `split` the split's name.
        features: features of a step, by path, such as "observation/image".
        num_episodes: number of records.
    """

    def __init__(self, path: epath.Path, split: str):
        """Reads the description of the data set.

        Raises:
            DatasetError: it cannot be read, there is no such split, or it is not RLDS.
        """
        self.path, self.split = path, split
        self._builder = _builder(path)
        info = self._builder.info
        if split not in info.splits:
            raise DatasetError(
                f"{path}: no split {split!r}; it has {', '.join(sorted(info.splits)) or 'none'}"
            )
        self._keys, self.features = _step_features(path, info.features)
        self.name, self.version = info.name, str(info.version)
        self._lengths = [int(length) for length in info.splits[split].shard_lengths]
        self.num_episodes = sum(self._lengths)
        if self.num_episodes < 1 or min(self._lengths) < 0:
            raise DatasetError(
                f"{path}: the description counts no episodes in {split!r} (shardLengths in "
                f"{INFO_FILE} is {self._lengths}); {_BUILD_AGAIN}"
            )
        self._counted: set[int] = set()

    def values(self, steps: Sequence[Mapping[str, Any]], path: str) -> list[Any]:
        """The values of a feature in every step of a record."""
        keys = self._keys[path]
        return [functools.reduce(lambda node, key: node[key], keys, step) for step in steps]

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
        return np.concatenate([[0], np.cumsum(self._lengths)[:-1]]).astype(np.int64)

    def _places(self, ids: Int64[NpArray, " e"]) -> list[int]:
        """The files that hold these records."""
        places = np.searchsorted(self.file_starts, np.unique(ids), side="right") - 1
        return np.unique(places).tolist()

    def file_hashes(self, ids: Int64[NpArray, " e"]) -> dict[str, str]:
        """The sha256 of each file that holds some of the records, by name."""
        hashes = {}
        for place in self._places(ids):
            path = self.files[place]
            self._check_there(path)
            hashes[path.name] = digest(path)
        return hashes

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        hashed = hashlib.sha256(self.split.encode())
        for name in (INFO_FILE, "features.json"):
            path = self.path / name
            hashed.update(path.read_bytes() if path.exists() else b"")
        for path in self.files:
            self._check_there(path)
            sample(path, path.name, hashed)
        return hashed.hexdigest()

    def examples(self, ids: Int64[NpArray, " e"]) -> Iterator[Mapping[str, Any]]:
        """Yields records in the order of `ids`, their steps as a list, images as stored.

        TFRecord has no random access: if read out of order, records needed later are held in
        memory.

        Raises:
            DatasetError: a file is missing or damaged.
        """
        if self._other_files:
            raise DatasetError(
                f"{self.path}: {self._other_files} lie there, which {INFO_FILE} does not count; "
                f"remove what is left of another build, or {_BUILD_AGAIN}"
            )
        for place in self._places(ids):
            self._check_count(place)
        read = self._read_array_record if self._random_access else self._read_tfrecord
        try:
            yield from read(ids)
        except DatasetError:
            raise
        except Exception as error:
            raise self._damaged(f"split {self.split!r}", error) from error

    @property
    def _random_access(self) -> bool:
        return self._builder.info.file_format.value == "array_record"

    def _damaged(self, what: str, error: Exception) -> DatasetError:
        first = first_line(error)
        return DatasetError(
            f"{self.path}: {what} cannot be read; a file is truncated or damaged ({first}). Copy "
            "or build the data set again."
        )

    def _check_there(self, path: epath.Path) -> None:
        ensure(Path(path))
        if path.exists():
            return
        there = f"; there are {self._other_files}" if self._other_files else ""
        raise DatasetError(
            f"{path}: missing; split {self.split!r} needs it{there}. Copy the data set again; if "
            f"{INFO_FILE} is wrong, {_BUILD_AGAIN}"
        )

    @functools.cached_property
    def _other_files(self) -> str:
        """A few of the files named like shards of the split that the description does not count."""
        known = {path.name for path in self.files}
        starts = {m[1] for name in known if (m := _SHARD.fullmatch(name))}
        names = sorted(path.name for path in self.path.iterdir())
        shards = ((name, _SHARD.fullmatch(name)) for name in names if name not in known)
        found = [name for name, match in shards if match and match[1] in starts]
        return ", ".join([*found[:3], *(["..."] if len(found) > 3 else [])])

    def _check_count(self, place: int) -> None:
        """Checks that a file exists and holds as many records as the description states."""
        if place in self._counted:
            return
        path, expected = self.files[place], self._lengths[place]
        self._check_there(path)
        try:
            found = self._count(path)
        except Exception as error:
            raise self._damaged(path.name, error) from error
        if found not in (None, expected):
            raise DatasetError(
                f"{path}: holds {found} episodes, the description counts {expected} (shardLengths "
                f"in {INFO_FILE}); {_BUILD_AGAIN}"
            )
        self._counted.add(place)

    def _count(self, path: epath.Path) -> int | None:
        """The number of records in a file; None if its format does not say."""
        file_format = self._builder.info.file_format.value
        if file_format == "array_record":
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            with ArrayRecordDataSource(str(path)) as source:
                return len(source)
        return _count_tfrecords(path) if file_format == "tfrecord" else None

    def _decoders(self) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        nested: dict[str, Any] = {}
        for path, feature in self.features.items():
            if feature.encoded:
                *parents, leaf = self._keys[path]
                node = nested
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = tfds.decode.SkipDecoding()
        return {"steps": nested}

    def _read_array_record(self, ids: Int64[NpArray, " e"]) -> Iterator[Any]:
        source = self._builder.as_data_source(split=self.split, decoders=self._decoders())
        for index in ids.tolist():
            try:
                example = source[index]
                example = {**example, "steps": list(example["steps"])}
            except Exception as error:
                raise self._damaged(f"episode {index} of {self.split!r}", error) from error
            yield example

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
        """Records in ascending order; reads each file from the first to the last requested one."""
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
    """The splits of the data set at `path`.

    Raises:
        DatasetError: its description cannot be read.
    """
    return sorted(_builder(path).info.splits)


def _builder(path: epath.Path) -> Any:
    """TFDS declares most attributes used here as optional or not at all, hence Any."""
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


def _count_tfrecords(path: epath.Path) -> int:
    """Counts the records of a TFRecord file without reading them."""
    size, at, count = path.stat().length, 0, 0
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            length, _ = _TFRECORD_HEAD.unpack(file.read(_TFRECORD_HEAD.size))
            at += _TFRECORD_HEAD.size + length + _TFRECORD_TAIL
            count += 1
    if at != size:
        raise ValueError(f"the last record ends {at - size} bytes past the end")
    return count


def _step_features(
    path: epath.Path, features: Any
) -> tuple[dict[str, tuple[str, ...]], dict[str, Feature]]:
    """The keys that lead to each feature of a step, and the features, by path.

    Keys may contain slashes, so paths cannot be split at them.

    Raises:
        DatasetError: it is not an RLDS data set.
    """
    import tensorflow_datasets as tfds

    known = isinstance(features, tfds.features.FeaturesDict)
    steps = features["steps"] if known and "steps" in features else None
    if not isinstance(steps, tfds.features.Dataset):
        found = ", ".join(features if known else ()) or "none"
        expected = "no 'steps' among" if steps is None else "'steps' is no Dataset of steps, in"
        raise DatasetError(f"{path}: not an RLDS data set: {expected} its features ({found})")
    keys: dict[str, tuple[str, ...]] = {}
    flat: dict[str, Feature] = {}

    def add(above: tuple[str, ...], info: Any, encoded: bool) -> None:
        if isinstance(info, Mapping):  # A sequence of dictionaries.
            for key, below in info.items():
                add((*above, key), below, encoded=False)
        else:
            name = "/".join(above)
            keys[name] = above
            flat[name] = Feature(tuple(info.shape), np.dtype(info.np_dtype), encoded)

    def visit(node: Any, above: tuple[str, ...]) -> None:
        if isinstance(node, tfds.features.FeaturesDict):  # Not a Mapping.
            for key, below in node.items():
                visit(below, (*above, key))
        else:
            add(above, node.get_tensor_info(), isinstance(node, tfds.features.Image))

    try:
        visit(steps.feature, ())
    except Exception as error:
        raise DatasetError(f"{path}: unreadable features of the steps ({error})") from error
    return keys, flat
