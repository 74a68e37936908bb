"""Spends the rest of a budget."""

import numpy as np

from qvla_jax.solvers.arrays import FloatArray, IntArray, blocks, pick
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.relaxation import option_major


def fill(problem: AllocationProblem, choice: IntArray) -> IntArray:
    """Improves a feasible choice until no change of a single channel both improves it and fits.

    In rounds: every channel proposes the change that saves most cost per added byte among those
    that fit; the proposals are taken from the best down, skipping what no longer fits. Options off
    the convex hull take part, because a short step often fits where the hull's long one does not.

    Args:
        problem: the problem.
        choice: i64[C], feasible.

    Returns:
        i64[C], feasible, no more expensive.
    """
    choice = choice.copy()
    tables = (problem.sizes, *(resource.use for resource in problem.resources))
    limits = (problem.budget, *(resource.limit for resource in problem.resources))
    slack = np.array(
        [limit - int(pick(t, choice).sum()) for limit, t in zip(limits, tables, strict=True)],
        dtype=np.int64,
    )
    pool: IntArray | None = None
    while True:
        channels, options, ratios = _proposals(problem, choice, slack, pool)
        if len(channels) == 0:
            return choice
        if not problem.resources:
            # Slack only shrinks: a channel without a proposal now has none later.
            pool = np.sort(channels)
        order = np.argsort(-ratios)
        channels, options = channels[order], options[order]
        # i64[1 + R, k], what each proposal adds to the bytes and to every resource.
        added = np.stack(
            [t[channels, options] - t[channels, choice[channels]] for t in tables], axis=0
        )
        while len(channels):
            beyond = np.flatnonzero((np.cumsum(added, axis=1) > slack[:, None]).any(axis=0))
            count = int(beyond[0]) if len(beyond) else len(channels)
            choice[channels[:count]] = options[:count]
            slack -= added[:, :count].sum(axis=1)
            rest = slice(count, None)
            fits = (added[:, rest] <= slack[:, None]).all(axis=0)
            channels, options = channels[rest][fits], options[rest][fits]
            added = added[:, rest][:, fits]


def _proposals(
    problem: AllocationProblem, choice: IntArray, slack: IntArray, pool: IntArray | None
) -> tuple[IntArray, IntArray, FloatArray]:
    """The best fitting change of each channel: channel, option, saving per byte."""
    found: list[tuple[IntArray, IntArray, FloatArray]] = []
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
            better = (saved > 0) & (added <= slack[0]) & (ratio > best)
            for resource, left in zip(problem.resources, slack[1:].tolist(), strict=True):
                use = resource.use[channel]
                now = np.take_along_axis(use, choice[channel][:, None], axis=1)[:, 0]
                better &= use[:, j] - now <= left
            np.copyto(best, ratio, where=better)
            option[better] = j
        index = np.flatnonzero(option >= 0)
        found.append((channel[index], option[index], best[index]))
    channels, options, ratios = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return channels, options, ratios
