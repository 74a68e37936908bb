"""Reads RLDS data sets: episodes and frames in standard form, the same from either file format.

The data set's specification (`qvla_jax.data.open_x`) says which features they come from. Images are
decoded here and not by TensorFlow, so array_record and TFRecord give the same pixels, and a reader
of actions alone decodes none.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.data import open_x
from qvla_jax.data.episode import EncodedEpisode
from qvla_jax.data.location import RLDS, locate
from qvla_jax.data.open_x.features import check_features
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.open_x.standardize import standardize
from qvla_jax.data.records import SplitRecords
from qvla_jax.data.source import EpisodeSource
from qvla_jax.errors import DatasetError


class RldsDataset(EpisodeSource):
    """One split of an RLDS directory, or this process's share of it.

    Its `path` is the directory of the version (with dataset_info.json).
    """

    def __init__(
        self,
        path: str | PathLike[str],
        split: str = "train",
        *,
        spec: DatasetSpec | str | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set; reads only its description.

        Args:
            path: the directory of one version, or a parent with only one data set below it; or the
                address of one, such as gs://gresearch/robotics/taco_play/0.1.0; or the name of one
                on the Hugging Face Hub.
            split: a split's name; no slices.
            spec: how to read it: a specification, the name of one, or the name of a JSON file with
                one. By default it is found by the data set's name.
            process_index: the share to read: episodes `process_index`, `+ process_count`, ...
            process_count: number of shares.

        Raises:
            DatasetError: no data set there, no such split, no specification known, or the data set
                does not fit it.
        """
        self.path = locate(path, RLDS)
        self._records = SplitRecords(self.path, split)
        self.name, self.version = self._records.name, self._records.version
        self.split, self.num_episodes = split, self._records.num_episodes
        found = self._find_spec() if spec is None else open_x.load(spec)
        self.spec = found.for_features(self._records.features)
        try:
            check_features(self.spec, self._records.features)
        except DatasetError as error:
            raise DatasetError(f"{self.path}: {error}") from error
        self._share(process_index, process_count)

    def _find_spec(self) -> DatasetSpec:
        names = [self._records.spec_name(), self.name, self.path.parent.name]
        found = (open_x.find(name) for name in names if name)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            message = open_x.not_found(self.name, sorted(open_x.NAMES), like="libero")
            raise DatasetError(f"{self.path}: {message}")
        return spec

    def _read(self, ids: Int64[NpArray, " e"]) -> Iterator[EncodedEpisode | None]:
        for index, example in zip(ids.tolist(), self._records.examples(ids), strict=True):
            yield self._to_episode(index, example)

    def _groups(self, ids: Int64[NpArray, " e"]) -> Int64[NpArray, " e"]:
        # By file: records were shuffled when the set was written, and reading over the network
        # costs whole files, not episodes.
        return np.searchsorted(self._records.file_starts, ids, side="right")

    def file_hashes(self, ids: Sequence[int] | None = None) -> dict[str, str]:
        """The sha256 of each file that holds some of the episodes, by name; by default of all."""
        every = np.arange(self.num_episodes) if ids is None else np.asarray(ids, np.int64)
        return self._records.file_hashes(every)

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        return self._records.fingerprint()

    def _to_episode(self, index: int, example: Mapping[str, Any]) -> EncodedEpisode | None:
        steps, name = example["steps"], f"{self.path}: episode {index} of {self.split!r}"
        if not steps:
            raise DatasetError(f"{name} has no steps")
        try:
            return standardize(
                self.spec,
                partial(self._records.values, steps),
                len(steps),
                name=name,
                episode_id=index,
                metadata=_plain(example.get("episode_metadata", {})),
                features=self._records.features,
            )
        except DatasetError as error:
            raise DatasetError(f"{name}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.item() if isinstance(value, np.generic) else value
