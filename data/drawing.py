"""Draws of frames from one data set: which episodes are looked at, and which steps are taken."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qvla_jax.data.rlds import RldsDataset
from qvla_jax.data.sampling import interleave, spread, stratified
from qvla_jax.errors import DatasetError


@dataclass(frozen=True)
class Pool:
    """The episodes of a split that frames may be drawn from.

    Attributes:
      tasks: Ids of the episodes of each instruction.
      lengths: Steps of each episode.
      stride: Every so manyth step may be drawn, the first one included.
    """

    dataset: RldsDataset
    tasks: dict[str, list[int]]
    lengths: dict[int, int]
    stride: int

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def frames(self) -> int:
        """Number of frames that may be drawn."""
        return sum(len(self.steps(episode)) for episode in self.lengths)

    @property
    def split_frames(self) -> float:
        """Steps in the whole split, by the mean length of these episodes."""
        mean = sum(self.lengths.values()) / max(self.episodes, 1)
        return mean * self.dataset.num_episodes

    def steps(self, episode: int) -> range:
        """The steps of an episode that may be drawn."""
        return range(0, self.lengths[episode], self.stride)


def look(
    dataset: RldsDataset,
    *,
    max_episodes: int,
    stride: int,
    seed: int,
    seen: Callable[[], None] = lambda: None,
) -> Pool:
    """Reads the instructions and lengths of a split's episodes.

    Args:
      dataset: The split.
      max_episodes: Most episodes to read. A larger split is not read whole: files are drawn by the
        seed until they hold as many. Their records come in an order that was shuffled when the set
        was written, so that they are a sample of the split.
      stride: See `Pool`.
      seed: Draws the files.
      seen: Called after each episode.
    """
    tasks: dict[str, list[int]] = {}
    lengths: dict[int, int] = {}
    for encoded in dataset.encoded_episodes(dataset.sample_ids(max_episodes, seed=seed)):
        episode = encoded.episode
        tasks.setdefault(episode.instruction, []).append(episode.id)
        lengths[episode.id] = len(episode)
        seen()
    if not lengths:
        raise DatasetError(f"{dataset.path}: split {dataset.split!r} has no episode with a step")
    return Pool(dataset, tasks, lengths, stride)


def draw(
    pool: Pool, *, frames: int | None, trajectories: int | None, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Draws frames: spread evenly over tasks, in a task over episodes, in an episode over steps.

    Args:
      pool: What to draw from.
      frames: Number of frames; None takes every frame of the trajectories.
      trajectories: Number of episodes to draw from; None takes all.
      rng: Draws.

    Returns:
      Ids of episodes and steps.

    Raises:
      DatasetError: There are fewer frames or trajectories.
    """
    groups = [rng.permutation(ids) for _, ids in sorted(pool.tasks.items())]
    chosen = interleave([groups[i] for i in rng.permutation(len(groups))])
    where = f"{pool.dataset.path}: split {pool.dataset.split!r}"
    if trajectories is not None:
        if trajectories > len(chosen):
            raise DatasetError(
                f"{where}: {trajectories} trajectories asked for, there are {len(chosen)}"
            )
        chosen = chosen[:trajectories]
    steps = [pool.steps(episode) for episode in chosen]
    available = np.asarray([len(each) for each in steps])
    if frames is None:
        frames = int(available.sum())
    if frames > available.sum():
        raise DatasetError(
            f"{where}: {frames} frames asked for, {len(chosen)} episodes have {available.sum()}"
        )
    counts = spread(frames, available).tolist()
    return [
        (episode, each[place])
        for episode, each, count in zip(chosen, steps, counts, strict=True)
        for place in stratified(len(each), count, rng)
    ]
