import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import AllocationProblem, instances, solve

from .problems import brute_force, check, close, instances_tried, small_problems  # noqa: TID251


def tiles(options: int, multiple: int) -> np.ndarray:
    """The first and the last option are free."""
    return np.array([1, *[multiple] * (options - 2), 1][:options])


def counts_by_group(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    groups = np.zeros(problem.channels, dtype=int) if problem.groups is None else problem.groups
    counts = np.zeros((groups.max() + 1, problem.options), dtype=int)
    np.add.at(counts, (groups, choice), 1)
    return counts


@pytest.mark.parametrize(("multiple", "bits"), [(1, 3.0), (4, 6.0), (16, 3.0)])
def test_counts_are_multiples_and_the_price_is_small(multiple: int, bits: float) -> None:
    problem = instances.openvla_like(scale=0.03, budget_bits=bits, seed=1)
    problem = dataclasses.replace(problem, multiples=tiles(problem.options, multiple))
    solution = solve(problem, "greedy:aligned")
    check(problem, solution)
    counts = counts_by_group(problem, solution.choice)
    assert (counts[:, 1:-1] % multiple == 0).all()
    unaligned = solution.details["unaligned_cost"]
    assert solution.details["price"] == pytest.approx(solution.cost - unaligned)
    assert solution.cost < unaligned * (1.001 if multiple == 1 else 1.5)


@instances_tried(60)
@given(small_problems(max_channels=9), st.integers(1, 4))
def test_counts_are_multiples_where_that_is_possible(
    problem: AllocationProblem, multiple: int
) -> None:
    problem = dataclasses.replace(problem, multiples=tiles(problem.options, multiple))
    try:
        solution = solve(problem, "greedy:aligned")
    except (BudgetError, InputError):
        assume(multiple == 1)  # which every problem allows
        raise
    check(problem, solution)
    counts = counts_by_group(problem, solution.choice)
    assert (counts[:, 1:-1] % multiple == 0).all()


def test_every_count_can_be_tiled_where_the_group_is_whole_tiles() -> None:
    problem = instances.random_instance("monotone", channels=64, seed=3)
    problem = dataclasses.replace(problem, multiples=np.array([8, 8, 8, 8, 8]))
    solution = solve(problem, "greedy:aligned")
    assert (counts_by_group(problem, solution.choice) % 8 == 0).all()
    problem = dataclasses.replace(problem, multiples=np.array([7, 7, 7, 7, 7]))
    with pytest.raises(InputError, match="cannot have counts in multiples"):
        solve(problem, "greedy:aligned")


@instances_tried(40)
@given(small_problems(max_channels=6), st.integers(2, 3))
def test_integer_programming_finds_the_best_multiples(
    problem: AllocationProblem, multiple: int
) -> None:
    problem = dataclasses.replace(problem, multiples=tiles(problem.options, multiple))
    best = brute_force(problem)
    if best is None:
        with pytest.raises(BudgetError):
            solve(problem, "ilp")
        return
    solution = solve(problem, "ilp")
    check(problem, solution)
    assert solution.cost == pytest.approx(best, abs=close(problem))
    assert solution.status == "optimal"
    try:
        heuristic = solve(problem, "greedy:aligned")
    except (BudgetError, InputError):
        return
    assert heuristic.cost >= best - close(problem)


def test_solvers_that_know_no_multiples_refuse_them() -> None:
    problem = instances.random_instance("monotone", channels=8, seed=3)
    problem = dataclasses.replace(problem, multiples=tiles(5, 4))
    with pytest.raises(InputError, match="use evolutionary or greedy:aligned or ilp"):
        solve(problem, "core")
