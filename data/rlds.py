"""Reads RLDS data sets: episodes and frames in standard form, the same from either file format.

The data set's specification (`qvla_jax.data.open_x`) says which features they come from. Images are
decoded here and not by TensorFlow, so array_record and TFRecord give the same pixels, and a reader
of actions alone decodes none.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import Any

import numpy as np
from etils import epath

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.data import open_x
from qvla_jax.data.episode import EncodedEpisode, Episode, Frame
from qvla_jax.data.open_x.features import check_features
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.open_x.standardize import standardize
from qvla_jax.data.places import dataset_folder
from qvla_jax.data.records import INFO_FILE, SplitRecords
from qvla_jax.errors import DatasetError, InputError, QvlaError, unknown


class RldsDataset:
    """One split of an RLDS directory, or this process's share of it.

    Attributes:
        path: the directory of the version (with dataset_info.json).
        name: name of the data set, `version` its version, `split` the split read.
        spec: how its steps are read.
        episode_ids: positions in the split of the episodes that this process reads.
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
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index {process_index} is not in [0, {process_count})")
        self.path = find_version(path)
        self._records = SplitRecords(self.path, split)
        self.name, self.version = self._records.name, self._records.version
        self.split, self.num_episodes = split, self._records.num_episodes
        self.spec = self._find_spec() if spec is None else open_x.load(spec)
        try:
            check_features(self.spec, self._records.features)
        except DatasetError as error:
            raise DatasetError(f"{self.path}: {error}") from error
        self.episode_ids = np.arange(process_index, self.num_episodes, process_count)

    def _find_spec(self) -> DatasetSpec:
        names = [self._records.spec_name(), self.name, self.path.parent.name]
        found = (open_x.find(name) for name in names if name)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            raise DatasetError(
                f"{self.path}: {unknown('data set', self.name, sorted(open_x.NAMES))} If it has "
                "the layout of one of these, name that (--spec, such as libero); else write a spec "
                "as a JSON file and name the file. docs/data.md shows how."
            )
        return spec

    def __len__(self) -> int:
        """Number of episodes that this process reads."""
        return len(self.episode_ids)

    def episodes(
        self,
        indices: Sequence[int] | Int64[NpArray, " e"] | None = None,
        *,
        images: bool = True,
        seed: int | None = None,
    ) -> Iterator[Episode]:
        """Yields episodes in the given order, except those without a step that their spec keeps.

        Args:
            indices: ids of episodes (positions in the split); by default those of this process.
            images: whether to decode images; without, reading is several times faster.
            seed: permutes the order; None keeps it.

        Raises:
            DatasetError: an id is out of range, a file is damaged, or a step holds an invalid
                picture, number or instruction; docs/data.md lists what is checked.
        """
        for encoded in self.encoded_episodes(indices, seed=seed):
            yield encoded.decode() if images else encoded.episode

    def frames(
        self,
        horizon: int = 8,
        *,
        indices: Sequence[int] | Int64[NpArray, " e"] | None = None,
        seed: int | None = None,
        shuffle_episodes: int = 16,
    ) -> Iterator[Frame]:
        """Yields single frames with the next `horizon` actions.

        Args:
            horizon: number of actions; the last one of the episode is repeated past its end.
            indices: as in `episodes`.
            seed: None yields frames in order. Otherwise episodes are permuted and the frames of
                `shuffle_episodes` at a time (held in memory) are mixed.
            shuffle_episodes: see `seed`.
        """
        if seed is None:
            for episode in self.episodes(indices):
                yield from (episode.frame(step, horizon) for step in range(len(episode)))
            return
        rng = np.random.default_rng([seed, 1])
        held: list[Episode] = []
        for episode in self.episodes(indices, seed=seed):
            held.append(episode)
            if len(held) == shuffle_episodes:
                yield from _mixed(held, horizon, rng)
                held = []
        yield from _mixed(held, horizon, rng)

    def encoded_episodes(
        self,
        indices: Sequence[int] | Int64[NpArray, " e"] | None = None,
        *,
        seed: int | None = None,
    ) -> Iterator[EncodedEpisode]:
        """Yields episodes with their images undecoded."""
        ids = self.episode_ids if indices is None else np.asarray(indices, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_episodes):
            raise DatasetError(
                f"{self.path}: episode ids of split {self.split!r} run from 0 to "
                f"{self.num_episodes - 1}, got {ids.min()} to {ids.max()}"
            )
        if seed is not None:
            ids = np.random.default_rng(seed).permutation(ids)
        for index, example in zip(ids.tolist(), self._records.examples(ids), strict=True):
            encoded = self._to_episode(index, example)
            if encoded is not None:
                yield encoded

    def sample_ids(self, count: int, *, seed: int) -> Int64[NpArray, " e"]:
        """Draws ids of `count` of this process's episodes from few files; all if there are no more.

        Reading over the network costs whole files, not episodes.
        """
        if len(self.episode_ids) <= count:
            return self.episode_ids
        # A separate stream: later draws do not depend on whether this one is made.
        rng = np.random.default_rng([seed, 2])
        starts = self._records.file_starts
        place = np.searchsorted(starts, self.episode_ids, side="right")
        groups = [self.episode_ids[place == p] for p in rng.permutation(np.unique(place))]
        return np.sort(np.concatenate(groups)[:count])

    @cached_property
    def lengths(self) -> Mapping[int, int]:
        """Number of steps of each episode that this process reads (reads them all once)."""
        return {e.episode.id: len(e.episode) for e in self.encoded_episodes()}

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


def find_version(path: str | PathLike[str]) -> epath.Path:
    """The directory with dataset_info.json at `path`, or the only one up to two levels below.

    Of a data set elsewhere (see `dataset_folder`) it is the local one.

    Raises:
        DatasetError: there is none, or more than one, or it cannot be reached.
    """
    path = epath.Path(dataset_folder(path))
    try:
        if (path / INFO_FILE).exists():
            return path
        if not path.is_dir():
            raise DatasetError(f"{path}: no such directory; expected an RLDS data set")
        for pattern in (f"*/{INFO_FILE}", f"*/*/{INFO_FILE}"):
            found = sorted(match.parent for match in path.glob(pattern))
            if len(found) == 1:
                return found[0]
            if found:
                names = ", ".join(map(str, found))
                raise DatasetError(f"{path}: several data sets, name one: {names}")
    except QvlaError:
        raise
    except Exception as error:
        # Any error of the library behind an address.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"{path}: cannot be reached ({first}). An address such as gs:// needs TensorFlow "
            "(pip install 'qvla-jax[rlds]') and the network; a copy on disk needs neither."
        ) from error
    raise DatasetError(f"{path}: no {INFO_FILE} in it or below; not an RLDS data set")


def _mixed(episodes: list[Episode], horizon: int, rng: np.random.Generator) -> Iterator[Frame]:
    where = [(episode, step) for episode in episodes for step in range(len(episode))]
    for index in rng.permutation(len(where)):
        episode, step = where[index]
        yield episode.frame(step, horizon)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.item() if isinstance(value, np.generic) else value
