"""Cost against bytes: the results of several solvers over many budgets, and the bound for each."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qvla_jax.errors import BudgetError
from qvla_jax.solvers.arrays import FloatArray, IntArray, Progress, no_progress
from qvla_jax.solvers.front import sweep
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import get_solver, solve

# Solvers that take seconds at millions of channels; the exact ones reach the bound anyway.
FAST = ("uniform", "greedy:released", "greedy:qvla", "greedy:marginal")


@dataclasses.dataclass(frozen=True, eq=False)
class Pareto:
    """Points of several solvers.

    Attributes:
        budgets: i64[q], bytes, rising.
        lower_bound: f64[q], no allocation within the budget costs less.
        cost: solver -> f64[q]; NaN where it found no allocation within the budget.
        size: solver -> f64[q], the bytes that it used; NaN likewise.
    """

    budgets: IntArray
    lower_bound: FloatArray
    cost: Mapping[str, FloatArray]
    size: Mapping[str, FloatArray]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types; null for NaN."""
        return {
            "budgets": self.budgets.tolist(),
            "lower_bound": self.lower_bound.tolist(),
            "cost": {name: _nullable(values) for name, values in self.cost.items()},
            "size": {name: _nullable(values) for name, values in self.size.items()},
        }


def pareto(
    problem: AllocationProblem,
    names: Iterable[str] = FAST,
    *,
    budgets: Sequence[int] | int = 16,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = no_progress,
) -> Pareto:
    """Runs solvers at many budgets; the problem's own budget plays no part.

    Args:
        problem: the problem.
        names: names from `available()`.
        budgets: bytes, or how many, evenly spaced from the least to the largest size.
        settings: settings for solvers, by name.
        progress: called with the budgets done.

    Raises:
        InputError: a name or a setting is unknown, or a solver cannot take the problem.
        BudgetError: a budget is below the least size.
    """
    chosen = tuple(names)
    given = settings or {}
    for name in chosen:
        get_solver(name).settings(given.get(name, {}))
    front = sweep(problem, budgets)
    order = np.argsort(front.budgets, kind="stable")
    cost = {name: np.full(len(order), np.nan) for name in chosen}
    size = {name: np.full(len(order), np.nan) for name in chosen}
    for point, budget in enumerate(front.budgets[order].tolist()):
        progress("pareto", point, len(order))
        under = problem.with_budget(budget)
        for name in chosen:
            try:
                solution = solve(under, name, **given.get(name, {}))
            except BudgetError:  # no uniform option fits, say
                continue
            cost[name][point], size[name][point] = solution.cost, solution.size
    progress("pareto", len(order), len(order))
    return Pareto(front.budgets[order], front.lower_bound[order], cost, size)


def _nullable(values: FloatArray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
