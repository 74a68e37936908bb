from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import AllocationProblem, instances, relax, solve, sweep

from .problems import brute_force, close, instances_tried, small_problems  # noqa: TID251


@instances_tried(60)
@given(small_problems())
def test_every_point_brackets_the_optimum(problem: AllocationProblem) -> None:
    front = sweep(problem, 7)
    for point, budget in enumerate(front.budgets):
        there = problem.with_budget(int(budget))
        best = brute_force(there)
        choice = front.choice(point)
        assert problem.size_of(choice) == front.size[point] <= budget
        assert problem.cost_of(choice) == pytest.approx(front.cost[point], abs=close(problem))
        assert front.lower_bound[point] <= best <= front.cost[point] + close(problem)
        bound = relax(there).lower_bound
        assert front.lower_bound[point] == pytest.approx(bound, abs=close(problem))


def test_a_sweep_agrees_with_single_solutions(tmp_path: Path) -> None:
    problem = instances.openvla_like(scale=0.01, seed=4)
    front = sweep(problem, [problem.budget, problem.budget // 2])
    for point in range(2):
        there = problem.with_budget(int(front.budgets[point]))
        one = solve(there, "lagrangian", repair=False)
        np.testing.assert_array_equal(front.choice(point), one.choice)
        assert front.cost[point] == pytest.approx(one.cost, rel=1e-12)
        assert front.multiplier[point] == one.multiplier
    front.save(tmp_path / "front.npz")
    assert (tmp_path / "front.npz").is_file()


def test_the_front_falls_and_flattens() -> None:
    front = sweep(instances.random_instance("heavy_tailed", channels=2000, seed=1), 50)
    assert (np.diff(front.cost) <= 0).all()
    assert (np.diff(front.multiplier) <= 0).all()
    assert (front.cost >= front.lower_bound).all()


def test_impossible_sweeps_are_refused() -> None:
    problem = instances.random_instance("monotone", channels=5)
    with pytest.raises(BudgetError, match=f"take {problem.minimum_size} bytes"):
        sweep(problem, [0])
    with pytest.raises(InputError, match="at least one"):
        sweep(problem, [])
