"""Several budgets at once: prices for the resources other than bytes.

With a price p_r >= 0 on a unit of each resource r, every choice within all limits costs at least

    g(p) = [least of cost + sum of p_r * use_r within the bytes]  -  sum of p_r * limit_r,

and the bracket is again the problem with bytes alone, whose relaxation is solved exactly. g is
concave; its maximum is found with cutting planes (Kelley, 1960), which end with a certificate: each
evaluation bounds g from above everywhere.
"""

import dataclasses
import functools
import importlib
import operator
from typing import Any

import numpy as np

from qvla_jax.errors import BudgetError
from qvla_jax.solvers.arrays import FloatArray, IntArray, pick
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.relaxation import Relaxation, relax, take_ties

# Relative distance of the best bound from the cutting planes' at which the search ends.
_TOLERANCE = 1e-7
# The box around the prices grows by this factor where the maximum may lie outside.
_GROWTH = 16.0


@dataclasses.dataclass(frozen=True)
class Priced:
    """The best prices found.

    Attributes:
        relaxation: that of the priced problem; its bound is one for the problem itself.
        choices: choices at all the prices tried, within the bytes and best first by bound; they
            may exceed the resources' limits.
    """

    relaxation: Relaxation
    choices: tuple[IntArray, ...]


def relax_all(problem: AllocationProblem, *, iterations: int = 60) -> Priced:
    """Relaxes the bytes and all resources.

    Args:
        problem: the problem.
        iterations: prices tried at most; each takes one `relax`.

    Raises:
        BudgetError: the budgets contradict each other, even with fractions of options.
    """
    if not problem.resources:
        relaxation = relax(problem)
        levels, _ = take_ties(problem, relaxation)
        return Priced(relaxation, (relaxation.hulls.choice(levels),))
    ceiling = float(problem.costs.max(axis=1).sum())
    # Cutting planes: value, slope and prices of each evaluation.
    planes: list[tuple[float, FloatArray, FloatArray]] = []
    tried: list[tuple[float, IntArray]] = []
    # Keep only the best: a relaxation's hulls take 200 MB at full scale.
    found: tuple[float, Relaxation] | None = None
    prices = np.zeros(len(problem.resources))
    box = np.zeros_like(prices)
    for _ in range(iterations):
        relaxation, choice, slope = _at(problem, prices)
        value = relaxation.lower_bound
        planes.append((value, slope, prices))
        tried.append((value, choice))
        if found is None or value > found[0]:
            found = value, relaxation
        if value > ceiling + 1e-9 * abs(ceiling):
            names = " and ".join(resource.name for resource in problem.resources)
            raise BudgetError(
                f"No allocation keeps within {problem.budget:,} bytes and the limits on {names} at "
                "once; raise one of them."
            )
        if not box.any():
            box = _first_box(problem, relaxation)
        best = found[0]
        prices, most = _highest(planes, box)
        # A maximum on the edge of the box means that the box was too small.
        edge = prices >= box * (1 - 1e-9)
        box = np.where(edge, box * _GROWTH, box)
        if most - best <= _TOLERANCE * max(abs(best), abs(most)) and not edge.any():
            break
    assert found is not None
    tried.sort(key=lambda item: -item[0])
    return Priced(found[1], tuple(choice for _, choice in tried))


def priced_costs(problem: AllocationProblem, prices: FloatArray | tuple[float, ...]) -> FloatArray:
    """f64[C, n], costs with what the resources cost at these prices."""
    terms = [
        price * resource.use
        for price, resource in zip(prices, problem.resources, strict=True)
        if price
    ]
    return functools.reduce(operator.add, terms, problem.costs)


def _at(problem: AllocationProblem, prices: FloatArray) -> tuple[Relaxation, IntArray, FloatArray]:
    """Relaxation at some prices, its choice rounded down, and the slope of g."""
    priced = dataclasses.replace(problem, costs=priced_costs(problem, prices), resources=())
    inner = relax(priced)
    levels, critical = take_ties(priced, inner)
    choice = inner.hulls.choice(levels)
    used = np.array([float(resource.used_by(choice)) for resource in problem.resources])
    if critical is not None:
        # The fraction of the critical step that spends the bytes exactly.
        levels[critical] += 1
        option = int(inner.hulls.choice(levels)[critical])
        here = int(choice[critical])
        step = int(problem.sizes[critical, option] - problem.sizes[critical, here])
        share = (problem.budget - int(pick(problem.sizes, choice).sum())) / step
        used += share * np.array(
            [float(r.use[critical, option] - r.use[critical, here]) for r in problem.resources]
        )
    limits = np.array([float(resource.limit) for resource in problem.resources])
    paid = float(prices @ limits)
    bound = inner.lower_bound - paid - 8 * float(np.finfo(np.float64).eps) * paid
    relaxation = dataclasses.replace(
        inner, lower_bound=bound, prices=tuple(float(price) for price in prices)
    )
    return relaxation, choice, used - limits


def _first_box(problem: AllocationProblem, relaxation: Relaxation) -> FloatArray:
    """Prices at which each resource costs as much as the bytes do, or all options together."""
    spread = float(np.ptp(problem.costs, axis=1).sum()) or 1.0
    total = relaxation.multiplier * problem.budget or spread
    return np.array([total / max(1, resource.limit) for resource in problem.resources])


def _highest(
    planes: list[tuple[float, FloatArray, FloatArray]], box: FloatArray
) -> tuple[FloatArray, float]:
    """The prices within the box at which the lowest of the planes is highest."""
    optimize: Any = importlib.import_module("scipy.optimize")
    scale = max(abs(value) for value, *_ in planes) or 1.0
    # Unknowns: prices as shares of the box, and the height in units of the scale.
    rows = [[*(-slope * box / scale), 1.0] for _, slope, _ in planes]
    sides = [(value - slope @ prices) / scale for value, slope, prices in planes]
    result = optimize.linprog(
        [*np.zeros(len(box)), -1.0],
        A_ub=np.array(rows),
        b_ub=np.array(sides),
        bounds=[*((0.0, 1.0) for _ in box), (None, None)],
    )
    if result.status != 0:  # numerically exhausted: keep the best plane
        value, _, prices = max(planes, key=lambda plane: plane[0])
        return prices, value
    return np.asarray(result.x[:-1]) * box, float(-result.fun) * scale
