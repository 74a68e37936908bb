"""Even draws: over groups, over episodes of unequal length, over the length of an episode."""

from collections.abc import Sequence

import numpy as np

from qvla_jax.array_typing import Int64, NpArray


def interleave(groups: Sequence[Int64[NpArray, " e"]]) -> list[int]:
    """One of each group, then another of each, ...: any prefix is spread over the groups."""
    longest = max((len(group) for group in groups), default=0)
    return [int(group[i]) for i in range(longest) for group in groups if i < len(group)]


def spread(total: int, capacity: Int64[NpArray, " e"]) -> Int64[NpArray, " e"]:
    """Divides `total` as evenly as `capacity` allows, earlier ones first."""
    counts = np.zeros_like(capacity)
    while (left := total - int(counts.sum())) > 0:
        open_ones = np.flatnonzero(counts < capacity)
        share, extra = divmod(left, len(open_ones))
        if share:
            room = capacity[open_ones] - counts[open_ones]
            counts[open_ones] += np.minimum(share, room)
        else:
            counts[open_ones[:extra]] += 1
    return counts


def apportion(
    total: int, weights: Sequence[float], capacity: Sequence[int]
) -> Int64[NpArray, " e"]:
    """Divides `total` in proportion to `weights`, by largest remainders.

    Shares beyond a capacity go to the others, in proportion to their weights.

    Args:
        total: at most the sum of `capacity`.
        weights: positive.
        capacity: maximum for each.
    """
    shares = np.asarray(weights, np.float64)
    limits = np.asarray(capacity, np.int64)
    counts = np.zeros(len(limits), np.int64)
    while True:
        fixed = (counts == limits) & (counts > 0) | (limits == 0)
        left = total - int(counts[fixed].sum())
        quotas = np.where(fixed, 0.0, shares)
        quotas = left * quotas / max(quotas.sum(), np.finfo(np.float64).tiny)
        full = ~fixed & (quotas >= limits)
        if not full.any():
            break
        counts[full] = limits[full]
    counts[~fixed] = np.floor(quotas[~fixed]).astype(np.int64)
    remainders = np.where(fixed, -1.0, quotas - np.floor(quotas))
    for place in np.argsort(-remainders, kind="stable")[: total - int(counts.sum())]:
        counts[place] += 1
    return counts


def stratified(length: int, count: int, rng: np.random.Generator) -> Int64[NpArray, " f"]:
    """Draws `count` different steps, one from each of as many equal stretches of `length`."""
    edges = np.arange(count + 1) * length // max(count, 1)
    return rng.integers(edges[:-1], edges[1:])
