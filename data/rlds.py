"""Reads RLDS data sets: episodes and frames as numpy, the same from either file format.

Images are decoded here and not by TensorFlow, so that array_record and TFRecord give the same
pixels, and a reader that wants actions only decodes none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.data.episode import EncodedEpisode, Episode, Frame, Transform
from qvla_jax.data.records import INFO_FILE, SplitRecords
from qvla_jax.errors import DatasetError, InputError


@dataclass(frozen=True, kw_only=True)
class RldsKeys:
    """Where a data set keeps what an `Episode` holds: paths inside a step, None for absent.

    The defaults are those of the public modified_libero_rlds sets.
    """

    image: str = "observation/image"
    wrist_image: str | None = "observation/wrist_image"
    state: str | None = "observation/state"
    joint_state: str | None = "observation/joint_state"
    action: str = "action"
    instruction: str = "language_instruction"

    def required(self) -> list[str]:
        """The paths that a data set must have; ``joint_state`` is taken where it is there."""
        keys = (self.image, self.wrist_image, self.state, self.action, self.instruction)
        return [key for key in keys if key is not None]


class RldsDataset:
    """One split of an RLDS directory, or this process's share of it.

    Attributes:
      path: The directory of the version (with dataset_info.json).
      name: Name of the data set, ``version`` its version, ``split`` the split read.
      episode_ids: Positions in the split of the episodes that this process reads.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        keys: RldsKeys | None = None,
        transform: Transform | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set; nothing but its description is read.

        Args:
          path: The directory of one version, or a parent with only one data set below it.
          split: A split's name; no slices.
          keys: Where the data set keeps its parts; modified_libero_rlds's places by default.
          transform: Applied to each episode, for instance `standardize.libero`.
          process_index: Which share to read: episodes ``process_index``, ``+ process_count``, ...
          process_count: Number of shares.

        Raises:
          DatasetError: No data set there, no such split, or keys missing.
        """
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index {process_index} is not in [0, {process_count})")
        self.path = find_version(path)
        self._records = SplitRecords(self.path, split)
        self.name, self.version = self._records.name, self._records.version
        self.split, self.num_episodes = split, self._records.num_episodes
        self._keys = keys or RldsKeys()
        self._transform = transform
        available = self._records.features
        missing = [key for key in self._keys.required() if key not in available]
        if missing:
            raise DatasetError(
                f"{self.path}: steps lack {', '.join(missing)}; they have "
                f"{', '.join(sorted(available))}. Pass RldsKeys that fit this data set."
            )
        self._has_joints = self._keys.joint_state in available
        self.episode_ids = np.arange(process_index, self.num_episodes, process_count)

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
        """Yields episodes in the order given.

        Args:
          indices: Ids of episodes (positions in the split); by default those of this process.
          images: Whether to decode images; without, reading is several times faster.
          seed: Permutes the order; None keeps it.

        Raises:
          DatasetError: An id is out of range, or a file is damaged.
        """
        for encoded in self.encoded_episodes(indices, seed=seed):
            episode = encoded.decode() if images else encoded.episode
            yield episode if self._transform is None else self._transform(episode)

    def frames(
        self,
        horizon: int = 8,
        *,
        indices: Sequence[int] | Int64[NpArray, " e"] | None = None,
        seed: int | None = None,
        shuffle_episodes: int = 16,
    ) -> Iterator[Frame]:
        """Yields single frames with the next ``horizon`` actions.

        Args:
          horizon: Number of actions; the last one of the episode is repeated past its end.
          indices: As in `episodes`.
          seed: None yields frames in order. Otherwise episodes are permuted and the frames of
            ``shuffle_episodes`` at a time (held in memory) are mixed.
          shuffle_episodes: See ``seed``.
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
        """Yields episodes with their images undecoded and without the transform."""
        ids = self.episode_ids if indices is None else np.asarray(indices, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_episodes):
            raise DatasetError(
                f"{self.path}: episode ids of split {self.split!r} run from 0 to "
                f"{self.num_episodes - 1}, got {ids.min()} to {ids.max()}"
            )
        if seed is not None:
            ids = np.random.default_rng(seed).permutation(ids)
        for index, example in zip(ids.tolist(), self._records.examples(ids), strict=True):
            yield self._to_episode(index, example)

    @cached_property
    def lengths(self) -> Mapping[int, int]:
        """Number of steps of each episode that this process reads (reads them all once)."""
        return {e.episode.id: len(e.episode) for e in self.encoded_episodes()}

    def file_hashes(self) -> dict[str, str]:
        """The sha256 of each file of the split, by name: its whole content is read."""
        return self._records.file_hashes()

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        return self._records.fingerprint()

    def _to_episode(self, index: int, example: Mapping[str, Any]) -> EncodedEpisode:
        steps, keys = example["steps"], self._keys
        if not steps:
            raise DatasetError(f"{self.path}: episode {index} of {self.split!r} has no steps")

        def column(key: str | None) -> list[Any] | None:
            return None if key is None else [_lookup(step, key) for step in steps]

        def floats(key: str | None) -> NpArray | None:
            values = column(key)
            return None if values is None else np.asarray(values, np.float32)

        def optional(key: str, default: float) -> NpArray:
            values = [step.get(key, default) for step in steps]
            return np.asarray(values, np.float32)

        episode = Episode(
            id=index,
            instruction=_text(_lookup(steps[0], keys.instruction)),
            image=None,
            wrist_image=None,
            state=floats(keys.state),
            joint_state=floats(keys.joint_state) if self._has_joints else None,
            action=np.asarray(column(keys.action), np.float32),
            reward=optional("reward", 0.0),
            discount=optional("discount", 1.0),
            is_terminal=np.asarray([step.get("is_terminal", False) for step in steps], np.bool_),
            metadata=_plain(example.get("episode_metadata", {})),
        )
        return EncodedEpisode(
            episode=episode,
            image=column(keys.image) or [],
            wrist_image=column(keys.wrist_image),
        )


def find_version(path: str | Path) -> Path:
    """The directory with dataset_info.json at ``path``, or the only one up to two levels below.

    Raises:
      DatasetError: There is none, or more than one.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: no such directory; expected an RLDS data set")
    for pattern in (INFO_FILE, f"*/{INFO_FILE}", f"*/*/{INFO_FILE}"):
        found = sorted(match.parent for match in path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise DatasetError(f"{path}: several data sets, name one: {', '.join(map(str, found))}")
    raise DatasetError(f"{path}: no {INFO_FILE} in it or below; not an RLDS data set")


def _mixed(episodes: list[Episode], horizon: int, rng: np.random.Generator) -> Iterator[Frame]:
    where = [(episode, step) for episode in episodes for step in range(len(episode))]
    for index in rng.permutation(len(where)):
        episode, step = where[index]
        yield episode.frame(step, horizon)


def _lookup(step: Mapping[str, Any], key: str) -> Any:
    value: Any = step
    for part in key.split("/"):
        value = value[part]
    return value


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.item() if isinstance(value, np.generic) else value
