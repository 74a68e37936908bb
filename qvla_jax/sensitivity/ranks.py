"""How well one ordering agrees with another: rank correlation, and overlap of the largest."""

import numpy as np

from qvla_jax.array_typing import Float


def mean_ranks(values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(a: Float[np.ndarray, " m"], b: Float[np.ndarray, " m"]) -> float:
    """Pearson correlation of the ranks; NaN where one side has no variation."""
    x, y = mean_ranks(np.asarray(a)), mean_ranks(np.asarray(b))
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm > 0 else float("nan")


def top_overlap(
    estimate: Float[np.ndarray, " m"], truth: Float[np.ndarray, " m"], *, share: float = 0.1
) -> float:
    """Share of the largest of `truth` (a tenth, at least one) that are the largest of `estimate`.

    Ties are broken by position, in the same way on both sides.
    """
    count = max(round(share * len(truth)), 1)
    found, wanted = (
        set(np.argsort(-np.asarray(v), kind="stable")[:count]) for v in (estimate, truth)
    )
    return len(found & wanted) / count
