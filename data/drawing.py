"""Draws frames from one data set: chooses the episodes to read and the steps to take."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qvla_jax.array_typing import Float32, NpArray
from qvla_jax.data.episode import next_steps
from qvla_jax.data.open_x.spec import JointActionSpec
from qvla_jax.data.sampling import interleave, spread, stratified
from qvla_jax.data.source import EpisodeSource
from qvla_jax.errors import DatasetError, InputError


@dataclass(frozen=True)
class Pool:
    """The episodes of a split that frames may be drawn from.

    Attributes:
        tasks: ids of the episodes of each instruction.
        lengths: steps of each episode.
        stride: every `stride`-th step may be drawn, starting with the first.
        deciding: steps of each episode whose next actions open or close the gripper; empty if that
            was not asked for.
        unlabeled: number of episodes skipped because they have no instruction.
    """

    dataset: EpisodeSource
    tasks: dict[str, list[int]]
    lengths: dict[int, int]
    stride: int
    deciding: dict[int, frozenset[int]]
    unlabeled: int

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
    dataset: EpisodeSource,
    *,
    max_episodes: int,
    stride: int,
    horizon: int | None,
    seed: int,
    seen: Callable[[], None] = lambda: None,
) -> Pool:
    """Reads the instructions and lengths of a split's episodes.

    As in the public training code, episodes without an instruction are skipped.

    Args:
        dataset: the split.
        max_episodes: maximum number of episodes to look at. Of a larger split a sample is drawn by
            the seed: whole files of RLDS, whose records were shuffled when the set was written, and
            single episodes of LeRobot.
        stride: see `Pool`.
        horizon: number of actions from a step on that can make it a deciding one; None does not
            look for deciding steps.
        seed: draws the files.
        seen: called after each episode.

    Raises:
        InputError: deciding steps are asked for, of actions that do not tell them.
        DatasetError: no episode has a step, or an instruction; or one cannot be read.
    """
    if horizon is not None and isinstance(dataset.spec.action, JointActionSpec):
        raise InputError(
            f"{dataset.path}: gripper_share: actions of spec {dataset.spec.name!r} are those of "
            "joints, which do not say where a gripper opens or closes; draw from all steps"
        )
    tasks: dict[str, list[int]] = {}
    lengths: dict[int, int] = {}
    deciding: dict[int, frozenset[int]] = {}
    unlabeled = 0
    ids = dataset.sample_ids(max_episodes, seed=seed)
    for outline in dataset.outlines(ids, gripper=horizon is not None):
        seen()
        if not outline.instruction.strip():
            unlabeled += 1
            continue
        tasks.setdefault(outline.instruction, []).append(outline.id)
        lengths[outline.id] = outline.length
        if horizon is not None and outline.gripper is not None:
            deciding[outline.id] = _deciding(outline.gripper, horizon)
    if not lengths:
        lacking = (
            f"an instruction: {dataset.spec.instruction} is empty in all {unlabeled} looked at"
            if unlabeled
            else "a step"
        )
        raise DatasetError(f"{dataset.path}: split {dataset.split!r} has no episode with {lacking}")
    return Pool(dataset, tasks, lengths, stride, deciding, unlabeled)


def _deciding(gripper: Float32[NpArray, " t"], horizon: int) -> frozenset[int]:
    opened = gripper > 0.5
    chunks = opened[next_steps(np.arange(len(opened)), len(opened), horizon)]
    return frozenset(np.flatnonzero(chunks.any(axis=1) & ~chunks.all(axis=1)).tolist())


def draw(
    pool: Pool,
    *,
    frames: int | None,
    trajectories: int | None,
    rng: np.random.Generator,
    gripper_share: float | None = None,
) -> list[tuple[int, int]]:
    """Draws frames, spread evenly over tasks, over a task's episodes, and over an episode's steps.

    Args:
        pool: what to draw from.
        frames: number of frames; None takes every frame of the trajectories.
        trajectories: number of episodes to draw from; None takes all.
        rng: draws.
        gripper_share: share of deciding frames; None draws from all frames equally.

    Returns:
        Ids of episodes and steps.

    Raises:
        DatasetError: there are fewer frames or trajectories.
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
    steps = [list(pool.steps(episode)) for episode in chosen]
    if frames is None:
        frames = sum(len(each) for each in steps)
    if gripper_share is None:
        parts = [("", frames, steps)]
    else:
        near, far = (
            [
                [step for step in each if (step in pool.deciding[episode]) == deciding]
                for episode, each in zip(chosen, steps, strict=True)
            ]
            for deciding in (True, False)
        )
        count = round(frames * gripper_share)
        parts = [
            (" where the gripper opens or closes", count, near),
            (" where it does not", frames - count, far),
        ]
    drawn: list[tuple[int, int]] = []
    for what, count, offered in parts:
        available = np.asarray([len(each) for each in offered])
        if count > available.sum():
            raise DatasetError(
                f"{where}: {count} frames{what} asked for, {len(chosen)} episodes have "
                f"{available.sum()}"
            )
        counts = spread(count, available).tolist()
        drawn += [
            (episode, each[place])
            for episode, each, some in zip(chosen, offered, counts, strict=True)
            for place in stratified(len(each), some, rng)
        ]
    return drawn
