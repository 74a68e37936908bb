"""Spearman's rank correlation, ties sharing their mean rank."""

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
