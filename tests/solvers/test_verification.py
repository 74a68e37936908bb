import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax.errors import BudgetError
from qvla_jax.solvers import (
    AllocationProblem,
    Resource,
    Solution,
    count_of,
    instances,
    solve,
    verify,
)

from .problems import HEURISTICS, brute_force, instances_tried, small_problems  # noqa: TID251

quick = instances_tried(100)


def dual_value(problem: AllocationProblem, prices: list[float]) -> Fraction:
    """The textbook formula, one channel and one fraction at a time."""
    tables = [problem.sizes, *(resource.use for resource in problem.resources)]
    limits = [problem.budget, *(resource.limit for resource in problem.resources)]
    value = -sum(Fraction(p) * limit for p, limit in zip(prices, limits, strict=False))
    for c in range(problem.channels):
        value += min(
            Fraction(float(problem.costs[c, j]))
            + sum(Fraction(p) * int(t[c, j]) for p, t in zip(prices, tables, strict=False))
            for j in range(problem.options)
            if problem.allowed is None or problem.allowed[c, j]
        )
    return value


@quick
@given(small_problems(), st.floats(0, 1e3), st.data())
def test_any_multiplier_proves_its_exact_dual_value(
    problem: AllocationProblem, multiplier: float, data: st.DataObject
) -> None:
    prices = ()
    if data.draw(st.booleans()):
        use = np.random.default_rng(0).integers(0, 9, problem.costs.shape)
        resource = Resource("use", use, 9 * problem.channels)
        problem = dataclasses.replace(problem, resources=(resource,))
        prices = (data.draw(st.floats(0, 10)),)
    solution = solve(problem, "ilp" if problem.resources else "dynamic_programming")
    exact = dual_value(problem, [multiplier, *prices])
    claimed = dataclasses.replace(
        solution, multiplier=multiplier, prices=prices, lower_bound=float(exact), status="feasible"
    )
    found = verify(problem, claimed)
    assert found.dual_bound == float(exact)
    # Brute force adds up in float64, and may end below the exact optimum.
    assert float(exact) <= brute_force(problem) + 1e-12 * float(np.abs(problem.costs).sum())
    proven = Fraction(claimed.lower_bound) <= exact  # float(exact) may be rounded up
    assert found.bound_proof == ("multiplier" if proven else "search")
    higher = dataclasses.replace(claimed, lower_bound=math.nextafter(float(exact), math.inf))
    assert verify(problem, higher).bound_proof == "search"


@quick
@given(small_problems(), st.sampled_from(HEURISTICS))
def test_bounds_of_heuristics_hold_to_the_last_bit(problem: AllocationProblem, name: str) -> None:
    try:
        solution = solve(problem, name)
    except BudgetError:
        return
    found = verify(problem, solution)
    assert found.ok, found.failures
    assert found.bound_proof == "multiplier"


@quick
@given(small_problems(), st.data())
def test_every_corrupted_claim_is_rejected(problem: AllocationProblem, data: st.DataObject) -> None:
    good = solve(problem, data.draw(st.sampled_from(("core", "greedy:marginal"))))
    shift = 1e-9 * (1 + abs(good.cost) + float(np.abs(problem.costs).max()))
    shift *= data.draw(st.sampled_from((1, 10**3, 10**9)))
    channel = data.draw(st.integers(0, problem.channels - 1))
    another = good.choice.copy()
    another[channel] = (another[channel] + 1) % problem.options
    outside = good.choice.copy()
    outside[channel] = data.draw(st.sampled_from((-1, problem.options)))
    corrupted: list[dict[str, object]] = [
        {"cost": good.cost + shift},
        {"cost": good.cost - shift},
        {"cost": math.nan},
        {"size": good.size + 1},
        {"size": good.size - 1},
        {"lower_bound": good.cost + shift},
        {"lower_bound": math.inf},
        {"lower_bound": math.nan},
        {"lower_bound": good.cost - shift, "status": "optimal"},
        {"multiplier": -1.0},
        {"multiplier": math.nan},
        {"prices": (1.0,)},
        {"status": "proven"},
        {"choice": outside},
        {"choice": good.choice[:-1]},
        {"choice": good.choice.astype(float)},
    ]
    cells = (problem.costs, problem.sizes)
    if any(t[channel, another[channel]] != t[channel, good.choice[channel]] for t in cells):
        near = abs(problem.cost_of(another) - good.cost) <= shift
        if problem.size_of(another) != good.size or not near:
            corrupted.append({"choice": another})
    for changes in corrupted:
        assert not verify(problem, dataclasses.replace(good, **changes)).ok, changes
    assert verify(problem, good).ok


def test_verify_names_every_false_claim() -> None:
    problem = instances.random_instance("weakly_correlated", channels=30, seed=2)
    good = solve(problem)
    assert verify(problem, good).ok

    def failures(problem: AllocationProblem = problem, **changes: object) -> str:
        return " ".join(verify(problem, dataclasses.replace(good, **changes)).failures)

    assert "exceed the budget" in failures(choice=problem.sizes.argmax(axis=1))
    assert "the size is" in failures(size=good.size - 1)
    assert "the cost is" in failures(cost=good.cost * 1.001)
    assert "exceeds the cost" in failures(lower_bound=good.cost * 1.001)
    assert "called optimal" in failures(lower_bound=good.cost * 0.9, status="optimal")
    assert "must be finite and not negative" in failures(multiplier=-1.0)
    assert "1 prices for 0 resources" in failures(prices=(1.0,))
    assert "one option 0 .. 4" in failures(choice=good.choice[:-1])
    assert "one option 0 .. 4" in failures(choice=good.choice + 3)
    assert "unknown status" in failures(status="great")
    closed = AllocationProblem(
        costs=problem.costs, sizes=problem.sizes, budget=10**9, fixed=np.zeros(30, dtype=int)
    )
    assert "closed to it" in failures(closed)
    low = dataclasses.replace(closed, fixed=None, groups=np.arange(30) // 15)
    assert "closed to it" in failures(dataclasses.replace(low, minimums=np.array([0, 4])))
    used = int((good.choice == good.choice[0]).sum())
    limits = count_of(int(good.choice[0]), problem.costs.shape, most=used - 1)
    assert "exceed the limit" in failures(dataclasses.replace(problem, resources=limits))
    tiled = dataclasses.replace(problem, multiples=np.full(5, 31))
    assert "no multiple of 31" in failures(tiled)
    by_group = np.ones((2, 5), dtype=int)
    by_group[1] = 31
    assert "of group 1 take" in failures(dataclasses.replace(low, multiples=by_group))


def test_a_bound_beyond_the_multiplier_is_marked_as_a_searchs() -> None:
    problem = instances.random_instance("weakly_correlated", channels=12, seed=2)
    assert verify(problem, solve(problem, "greedy:marginal")).bound_proof == "multiplier"
    assert verify(problem, solve(problem, "core")).bound_proof == "search"


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_exact_sums_take_costs_of_any_scale(scale: float) -> None:
    costs = np.array([[scale, 5e-324], [1e-20 * scale, 0.0]])
    problem = AllocationProblem(costs=costs, sizes=np.array([[0, 1], [0, 1]]), budget=1)
    solution: Solution = solve(problem, "dynamic_programming")
    assert verify(problem, solution).ok
    assert verify(problem, solution).cost == solution.cost
