"""Rechecks a solution's claims from the problem's numbers in exact arithmetic.

None of the solvers' code is used: not their relaxation, sums, or table of open options. Doubles are
whole multiples of a power of two; as Python integers they add up without any rounding.
"""

import collections
import dataclasses
import math
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_jax.solvers.arrays import BoolArray, FloatArray
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.solution import OPTIMALITY_TOLERANCE, Solution, Status

# Sums in float64 may differ from the exact ones by this share of the summed magnitudes.
_ROUNDING = Fraction(1, 10**12)
_ROWS = 65536


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        failures: one sentence for each claim that does not hold; empty when the solution is sound.
        cost: the cost, summed exactly and rounded once.
        size: the bytes.
        dual_bound: the lower bound that the solution's multiplier and prices prove by themselves,
            likewise; -inf where they are unusable.
        bound_proof: "multiplier" when that proves the claimed bound; "search" when the claimed one
            is tighter and rests on an exhaustive search, which cannot be checked without repeating
            it.
    """

    failures: tuple[str, ...]
    cost: float
    size: int
    dual_bound: float
    bound_proof: Literal["multiplier", "search"]

    @property
    def ok(self) -> bool:
        """True when every claim holds."""
        return not self.failures


def verify(problem: AllocationProblem, solution: Solution) -> Verification:
    """Checks a solution's claims: the choice, its cost and bytes, every constraint, the bound.

    The bound is checked by weak duality: at any multiplier and prices that are not negative, the
    sum over channels of the least penalized cost, minus the value of the budgets, is a lower bound
    on the cost of every feasible allocation.

    Args:
        problem: the problem that was solved.
        solution: any solution of it, from any source.

    Returns:
        The recomputed figures, and a sentence for every claim that does not hold.
    """
    choice = np.asarray(solution.choice)
    whole = np.issubdtype(choice.dtype, np.integer) and choice.shape == (problem.channels,)
    if not whole or bool(((choice < 0) | (choice >= problem.options)).any()):
        failure = (
            f"choice must hold one option 0 .. {problem.options - 1} for each of "
            f"{problem.channels} channels."
        )
        return Verification((failure,), math.nan, 0, -math.inf, "search")
    failures = _broken_constraints(problem, choice)
    rows = np.arange(problem.channels)
    size = sum(problem.sizes[rows, choice].tolist())
    if size != solution.size:
        failures.append(f"the size is {size} bytes, not {solution.size}.")
    if solution.status not in get_args(Status):
        failures.append(f"unknown status {solution.status!r}.")

    taken = problem.costs[rows, choice]
    unit = _unit(taken)
    cost = sum(_exact(taken, unit).tolist()) * Fraction(2) ** unit
    rounding = _ROUNDING * sum(_exact(np.abs(taken), unit).tolist()) * Fraction(2) ** unit
    dual = _dual_value(problem, solution.multiplier, solution.prices, failures)
    figures = Verification(
        failures=(),
        cost=float(cost),
        size=size,
        dual_bound=-math.inf if dual is None else float(dual),
        bound_proof="search",
    )
    if not (math.isfinite(solution.cost) and math.isfinite(solution.lower_bound)):
        failures.append("cost and lower bound must be finite.")
        return dataclasses.replace(figures, failures=tuple(failures))
    bound = Fraction(solution.lower_bound)
    if abs(cost - Fraction(solution.cost)) > rounding:
        failures.append(f"the cost is {float(cost)!r}, not {solution.cost!r}.")
    if bound > cost + rounding:
        failures.append(f"the lower bound {solution.lower_bound!r} exceeds the cost.")
    tolerance = 10 * Fraction(OPTIMALITY_TOLERANCE) * max(abs(cost), abs(bound))
    if solution.status == "optimal" and cost - bound > tolerance:
        failures.append(f"called optimal with a gap of {float(cost - bound):.3g}.")
    proven = dual is not None and bound <= dual
    return dataclasses.replace(
        figures, failures=tuple(failures), bound_proof="multiplier" if proven else "search"
    )


def _broken_constraints(problem: AllocationProblem, choice: NDArray[Any]) -> list[str]:
    rows = np.arange(problem.channels)
    failures: list[str] = []
    size = sum(problem.sizes[rows, choice].tolist())
    if size > problem.budget:
        failures.append(f"{size} bytes exceed the budget of {problem.budget}.")
    closed = np.flatnonzero(~_open_options(problem, slice(None))[rows, choice])
    if len(closed):
        failures.append(f"{problem.channel_name(int(closed[0]))} takes an option closed to it.")
    for resource in problem.resources:
        used = sum(resource.use[rows, choice].tolist())
        if used > resource.limit:
            failures.append(f"{used} exceed the limit of {resource.limit} on {resource.name}.")
    if problem.multiples is not None:
        groups = [0] * problem.channels if problem.groups is None else problem.groups.tolist()
        by_group = problem.multiples.ndim == 2
        counts = collections.Counter(zip(groups, choice.tolist(), strict=True))
        for (group, option), count in sorted(counts.items()):
            multiple = int(problem.multiples[(group, option) if by_group else option])
            if count % multiple:
                failures.append(
                    f"{count} channels of group {group} take option {option}: no multiple of "
                    f"{multiple}."
                )
    return failures


def _open_options(problem: AllocationProblem, rows: slice) -> BoolArray:
    option = np.arange(problem.options)[None, :]
    opened = np.ones(problem.costs[rows].shape, dtype=np.bool_)
    if problem.minimums is not None and problem.groups is not None:
        opened &= option >= problem.minimums[problem.groups[rows]][:, None]
    if problem.fixed is not None:
        fixed = problem.fixed[rows][:, None]
        opened &= (fixed == -1) | (fixed == option)
    return opened


def _dual_value(
    problem: AllocationProblem,
    multiplier: float,
    prices: tuple[float, ...],
    failures: list[str],
) -> Fraction | None:
    """The exact dual value; None, and a sentence more, where there is none."""
    paid = np.array([multiplier, *prices], dtype=np.float64)
    if not bool((np.isfinite(paid) & (paid >= 0)).all()):
        failures.append(
            f"the multiplier and prices must be finite and not negative, got {paid.tolist()}."
        )
        return None
    if len(prices) not in (0, len(problem.resources)):
        failures.append(f"{len(prices)} prices for {len(problem.resources)} resources.")
        return None
    uses = [problem.sizes, *(resource.use for resource in problem.resources)]
    limits = [problem.budget, *(resource.limit for resource in problem.resources)]
    unit = min(_unit(problem.costs), _unit(paid))
    exact_prices: list[int] = _exact(paid, unit).tolist()
    value = -sum(price * limit for price, limit in zip(exact_prices, limits, strict=False))
    for start in range(0, problem.channels, _ROWS):
        rows = slice(start, start + _ROWS)
        penalized = _exact(problem.costs[rows], unit)
        for price, use in zip(exact_prices, uses, strict=False):
            if price:
                penalized = penalized + price * use[rows].astype(object)
        penalized[~_open_options(problem, rows)] = math.inf
        value += sum(penalized.min(axis=1).tolist())
    return value * Fraction(2) ** unit


def _unit(values: FloatArray) -> int:
    """An exponent e such that every value is a whole multiple of 2**e."""
    _, exponent = np.frexp(values[values != 0])
    return int(exponent.min(initial=53)) - 53


def _exact(values: FloatArray, unit: int) -> NDArray[np.object_]:
    """The values as Python integers, in units of 2**unit."""
    mantissa, exponent = np.frexp(values)
    digits: Any = np.ldexp(mantissa, 53).astype(np.int64).astype(object)
    return digits << np.where(values == 0, 0, exponent - 53 - unit).astype(object)
