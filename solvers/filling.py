"""Spending what is left of a budget."""

import numpy as np

from qvla_jax.solvers.arrays import FloatArray, IntArray, blocks
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.relaxation import option_major


def fill(problem: AllocationProblem, choice: IntArray) -> IntArray:
    """Improves a feasible choice until no single change of one channel does and fits.

    In rounds: every channel proposes the change that saves most cost per added byte among those
    that fit; the proposals are taken from the best down, skipping what no longer fits. Options off
    the convex hull take part, because a short step often fits where the hull's long one does not.

    Args:
        problem: The problem.
        choice: i64[C], feasible.

    Returns:
        i64[C], feasible, not dearer.
    """
    choice = choice.copy()
    slack = problem.budget - problem.size_of(choice)
    pool: IntArray | None = None
    while True:
        channels, options, ratios, added = _proposals(problem, choice, slack, pool)
        if len(channels) == 0:
            return choice
        # Slack only shrinks: a channel without a proposal now has none later.
        pool = np.sort(channels)
        order = np.argsort(-ratios)
        channels, options, added = channels[order], options[order], added[order]
        while len(channels):
            beyond = np.flatnonzero(np.cumsum(added) > slack)
            count = int(beyond[0]) if len(beyond) else len(added)
            choice[channels[:count]] = options[:count]
            slack -= int(added[:count].sum())
            rest = slice(count, None)
            fits = added[rest] <= slack
            channels, options, added = channels[rest][fits], options[rest][fits], added[rest][fits]


def _proposals(
    problem: AllocationProblem, choice: IntArray, slack: int, pool: IntArray | None
) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
    """The best fitting change of each channel: channel, option, saving per byte, bytes."""
    found: list[tuple[IntArray, IntArray, FloatArray, IntArray]] = []
    count = problem.channels if pool is None else len(pool)
    for block in blocks(count):
        if pool is None:
            channel = np.arange(block.start, block.stop, dtype=np.int64)
            costs, sizes = option_major(problem, block)
        else:
            channel = pool[block]
            costs, sizes = option_major(problem, channel)
        here = choice[channel][None, :]
        cost = np.take_along_axis(costs, here, axis=0)[0]
        size = np.take_along_axis(sizes, here, axis=0)[0]
        best = np.zeros(len(channel))
        option = np.full(len(channel), -1, dtype=np.int64)
        for j in range(len(costs)):
            saved = cost - costs[j]
            added = sizes[j] - size
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                # A change that adds nothing is free: it comes first.
                ratio = np.where(added > 0, saved / added, np.inf)
            better = (saved > 0) & (added <= slack) & (ratio > best)
            np.copyto(best, ratio, where=better)
            option[better] = j
        index = np.flatnonzero(option >= 0)
        option = option[index]
        grown = (sizes[option, index] - size[index]).astype(np.int64)
        found.append((channel[index], option, best[index], grown))
    channels, options, ratios, added = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return channels, options, ratios, added
