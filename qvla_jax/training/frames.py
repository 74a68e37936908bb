"""Demonstration frames in memory, as the training loop takes them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.data.episode import next_steps
from qvla_jax.data.source import EpisodeSource
from qvla_jax.errors import DatasetError
from qvla_jax.families.family import Processor
from qvla_jax.progress import Progress, no_progress, track


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frames:
    """All frames of some splits: model inputs and the expert's chunks, in normalized space."""

    # A pytree of arrays [b, ...].
    inputs: Any
    chunks: Float[np.ndarray, "b h a"]

    def __len__(self) -> int:
        return len(self.chunks)

    def take(self, rows: np.ndarray) -> "Frames":
        """The frames at `rows`."""
        return jax.tree.map(lambda leaf: leaf[rows], self)


def load_frames(
    datasets: Sequence[EpisodeSource],
    processor: Processor,
    *,
    horizon: int,
    stage: str,
    progress: Progress = no_progress,
) -> Frames:
    """Reads every frame of one or more splits into memory.

    Episodes without an instruction are skipped, as in the public training code.

    One frame takes v H W 3 bytes: 98 kB for two cameras at 128 px, 1.9 GB for LIBERO-Spatial's
    20,000 frames.

    Args:
        datasets: opened splits.
        processor: the processor of the policy to train.
        horizon: actions of its chunks.
        stage: name of the progress bar.
        progress: reports one item per episode.

    Raises:
        DatasetError: a set cannot be read, or no episode has an instruction.
    """
    capacity = sum(sum(dataset.lengths.values()) for dataset in datasets)
    held: list[np.ndarray] = []  # of all frames: nothing is in memory twice
    form, filled = None, 0
    episodes = itertools.chain.from_iterable(dataset.episodes() for dataset in datasets)
    for episode in track(episodes, sum(map(len, datasets)), stage, progress):
        if not episode.labeled:
            continue
        steps = len(episode)
        inputs = processor(
            {
                **episode.cameras(),
                "state": episode.state,
                "instruction": list(episode.instructions),
            }
        )
        rows = next_steps(np.arange(steps), steps, horizon)
        chunks = processor.normalize_actions(
            processor.to_robot(episode.action[rows]), episode.state
        )
        leaves, form = jax.tree.flatten(Frames(inputs=inputs, chunks=chunks))
        held = held or [np.empty((capacity, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        for whole, leaf in zip(held, leaves, strict=True):
            whole[filled : filled + steps] = leaf
        filled += steps
    if form is None:
        names = ", ".join(f"{dataset.path} ({dataset.split})" for dataset in datasets)
        raise DatasetError(f"{names}: no episode has an instruction")
    return jax.tree.unflatten(form, [whole[:filled] for whole in held])
