"""What every reader of a data set offers, whatever its format.

An `EpisodeSource` is one split of a data set, or one process's share of it. Its episodes come in
standard form (`qvla_jax.data.episode`), so that calibration, statistics and training do not know
which format they read. `qvla_jax.data.opening.open_source` opens one.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from etils import epath

from qvla_jax.array_typing import Float32, Int64, NpArray
from qvla_jax.data.episode import EncodedEpisode, Episode, Frame
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.errors import DatasetError, InputError


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a draw has to know of an episode.

    Attributes:
        id: position of the episode in its split.
        length: number of its steps.
        instruction: the task in words at the first step; empty if it has none.
        gripper: 1 for open and 0 for closed at each step; None if it was not asked for. Actions of
            joints have none.
    """

    id: int
    length: int
    instruction: str
    gripper: Float32[NpArray, " t"] | None


class EpisodeSource(abc.ABC):
    """One split of a data set, or this process's share of it.

    Attributes:
        path: the directory of the data set.
        name: name of the data set, `version` its version, `split` the split read.
        num_episodes: number of episodes in the split, of all processes.
        spec: how its steps are read.
        episode_ids: positions in the split of the episodes that this process reads.
    """

    path: epath.Path
    name: str
    version: str
    split: str
    num_episodes: int
    spec: DatasetSpec
    episode_ids: Int64[NpArray, " e"]

    def _share(self, process_index: int, process_count: int) -> None:
        """Sets the ids of the episodes that this process reads."""
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index {process_index} is not in [0, {process_count})")
        self.episode_ids = np.arange(process_index, self.num_episodes, process_count)

    @abc.abstractmethod
    def _read(self, ids: Int64[NpArray, " e"]) -> Iterator[EncodedEpisode | None]:
        """Yields the episodes in the order of `ids`; None for one without a step to keep."""

    @abc.abstractmethod
    def _groups(self, ids: Int64[NpArray, " e"]) -> Int64[NpArray, " e"]:
        """The number of the group of each id: what `sample_ids` draws as a whole."""

    @abc.abstractmethod
    def file_hashes(self, ids: Sequence[int] | None = None) -> dict[str, str]:
        """The sha256 of each file that holds some of the episodes, by name; by default of all."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""

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
        ids = self._checked(indices)
        if seed is not None:
            ids = np.random.default_rng(seed).permutation(ids)
        for encoded in self._read(ids):
            if encoded is not None:
                yield encoded

    def outlines(
        self, ids: Sequence[int] | Int64[NpArray, " e"], *, gripper: bool
    ) -> Iterator[Outline]:
        """Yields what a draw has to know of episodes, except those without a step to keep.

        Args:
            ids: ids of episodes.
            gripper: whether to yield the gripper of each step, too.
        """
        for encoded in self.encoded_episodes(ids):
            episode = encoded.episode
            yield Outline(
                id=episode.id,
                length=len(episode),
                instruction=episode.instruction,
                gripper=episode.action[:, -1] if gripper else None,
            )

    def sample_ids(self, count: int, *, seed: int) -> Int64[NpArray, " e"]:
        """Draws ids of `count` of this process's episodes; all if there are no more.

        They come from few files where each file is a fair sample.
        """
        if len(self.episode_ids) <= count:
            return self.episode_ids
        # A separate stream: later draws do not depend on whether this one is made.
        rng = np.random.default_rng([seed, 2])
        groups, group = np.unique(self._groups(self.episode_ids), return_inverse=True)
        turn = np.argsort(rng.permutation(len(groups)))
        return np.sort(self.episode_ids[np.argsort(turn[group], kind="stable")][:count])

    @cached_property
    def lengths(self) -> Mapping[int, int]:
        """Number of steps of each episode that this process reads."""
        return {o.id: o.length for o in self.outlines(self.episode_ids, gripper=False)}

    def _checked(
        self, indices: Sequence[int] | Int64[NpArray, " e"] | None
    ) -> Int64[NpArray, " e"]:
        ids = self.episode_ids if indices is None else np.asarray(indices, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_episodes):
            raise DatasetError(
                f"{self.path}: episode ids of split {self.split!r} run from 0 to "
                f"{self.num_episodes - 1}, got {ids.min()} to {ids.max()}"
            )
        return ids


def _mixed(episodes: list[Episode], horizon: int, rng: np.random.Generator) -> Iterator[Frame]:
    where = [(episode, step) for episode in episodes for step in range(len(episode))]
    for index in rng.permutation(len(where)):
        episode, step = where[index]
        yield episode.frame(step, horizon)
