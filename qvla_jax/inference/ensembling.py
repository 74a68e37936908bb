"""Temporal ensembling: one action from all chunks that predicted this step.

As in UniVLA's evaluation in LIBERO, the policy is queried at every step, and the newest prediction
of a step has the largest weight. (The original, in ACT, arXiv 2304.13705, gives it to the oldest.)
"""

import collections

import numpy as np

from qvla_jax.array_typing import Float

# Each step of age takes this much off the logarithm of a prediction's weight.
_DECAY = 0.1


class TemporalEnsemble:
    """Weighted mean of the predictions for each step, weights exp(-0.1 age)."""

    def __init__(self, horizon: int):
        """Starts an episode.

        Args:
            horizon: actions in a chunk; older chunks no longer reach the step.
        """
        self._chunks: collections.deque[Float[np.ndarray, "h a"]] = collections.deque(
            maxlen=horizon
        )

    def reset(self) -> None:
        """Starts another episode."""
        self._chunks.clear()

    def __call__(self, chunk: Float[np.ndarray, "h a"]) -> Float[np.ndarray, " a"]:
        """The chunk of this step -> the action of this step, in the space of the chunks."""
        self._chunks.appendleft(np.asarray(chunk, np.float64))
        predictions = np.stack([chunk[age] for age, chunk in enumerate(self._chunks)])
        weights = np.exp(-_DECAY * np.arange(len(predictions)))
        return (weights @ predictions / weights.sum()).astype(np.float32)
