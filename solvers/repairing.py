"""Brings a choice within all budgets."""

import numpy as np

from qvla_jax.solvers.arrays import FloatArray, IntArray, pick
from qvla_jax.solvers.problem import AllocationProblem

_ROUNDS = 100


def repair(problem: AllocationProblem, choice: IntArray, weights: FloatArray) -> IntArray | None:
    """Changes channels until bytes and resources are within their limits.

    In rounds: every channel proposes the change that costs least per unit of excess that it removes
    (the budgets' excesses, each as a share of its limit); the proposals are taken from the best
    down while they help.

    Args:
        problem: the problem.
        choice: i64[C], of allowed options.
        weights: f64[C, n], what the options cost, priced or not.

    Returns:
        i64[C], feasible; None if no single change helps any more.
    """
    choice = choice.copy()
    tables = [problem.sizes, *(resource.use for resource in problem.resources)]
    limits = np.array(
        [problem.budget, *(resource.limit for resource in problem.resources)], dtype=np.float64
    )
    unit = np.maximum(limits, 1.0)
    excess = np.array([float(pick(table, choice).sum()) for table in tables]) - limits
    rows = np.arange(problem.channels)
    for _ in range(_ROUNDS):
        if bool((excess <= 0).all()):
            return choice
        # The summed excess that remains after each change of one channel.
        left = np.zeros(problem.costs.shape)
        for table, above, scale in zip(tables, excess, unit, strict=True):
            change = table - table[rows, choice][:, None]
            left += np.maximum(above + change, 0.0) / scale
        relief = float((np.maximum(excess, 0.0) / unit).sum()) - left
        loss = weights - weights[rows, choice][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(relief > 1e-15, loss / relief, np.inf)
        if problem.allowed is not None:
            ratio[~problem.allowed] = np.inf
        option = ratio.argmin(axis=1)
        best = ratio[rows, option]
        helped = False
        for channel in np.argsort(best, kind="stable").tolist():
            if best[channel] == np.inf or bool((excess <= 0).all()):
                break
            here, there = int(choice[channel]), int(option[channel])
            change = np.array([float(t[channel, there] - t[channel, here]) for t in tables])
            now = float((np.maximum(excess, 0.0) / unit).sum())
            if float((np.maximum(excess + change, 0.0) / unit).sum()) < now - 1e-15:
                choice[channel] = there
                excess += change
                helped = True
        if not helped:
            return None
    return choice if bool((excess <= 0).all()) else None
