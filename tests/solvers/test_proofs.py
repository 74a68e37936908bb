"""Every solver against brute force on seeded instances that leave the exact ones work to do.

`make prove-solvers` tries thousands.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from qvla_jax.errors import BudgetError
from qvla_jax.solvers import AllocationProblem, Solution, relax, solve, sweep

from .problems import BACKENDS, FACTOR, HEURISTICS, brute_force, check, close  # noqa: TID251

PARTS = 4
SEEDS = 15 * FACTOR  # of each part


def random_problem(rng: np.random.Generator) -> AllocationProblem:
    """5 to 8 channels, 2 to 4 options, a budget well inside the range; a third constrained."""
    channels, options = int(rng.integers(5, 9)), int(rng.integers(2, 5))
    shape = channels, options
    largest = int(rng.choice([9, 100, 10_000]))
    sizes = rng.integers(0, largest, shape, endpoint=True)
    kind = rng.integers(5)
    if kind == 0:
        costs = rng.integers(0, largest, shape).astype(float)
    elif kind == 1:  # costs rise and fall with what is saved
        costs = (largest - sizes + rng.integers(-3, 4, shape)).astype(float)
    elif kind == 2:  # subset sum: every byte saves the same
        costs = (largest - sizes).astype(float)
    elif kind == 3:
        costs = np.exp(rng.normal(0, 4, (channels, 1)) + rng.normal(0, 0.5, shape))
        costs *= 4.0 ** -np.argsort(np.argsort(sizes, axis=1), axis=1)
    else:
        costs = rng.normal(0, 1, shape)
    groups = minimums = fixed = None
    if rng.random() < 1 / 3:
        groups = np.append(rng.integers(0, 2, channels - 1), 1)
        minimums = rng.integers(0, 2, 2)
        fixed = np.where(rng.random(channels) < 0.2, options - 1, -1)
    loose = AllocationProblem(
        costs=costs, sizes=sizes, budget=2**40, groups=groups, minimums=minimums, fixed=fixed
    )
    span = loose.maximum_size - loose.minimum_size
    return loose.with_budget(loose.minimum_size + int(rng.uniform(0.1, 0.8) * span))


def reordered(problem: AllocationProblem, order: np.ndarray) -> AllocationProblem:
    parts = {
        name: None if value is None else value[order]
        for name in ("costs", "sizes", "groups", "fixed")
        for value in [getattr(problem, name)]
    }
    return dataclasses.replace(problem, **parts)


@pytest.mark.parametrize("part", range(PARTS))
def test_all_solvers_against_brute_force(part: int) -> None:
    searched = 0
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng)
        best, tolerance = brute_force(problem), close(problem)
        assert relax(problem).lower_bound <= best, seed

        exact: list[Solution] = [solve(problem, name) for name in ("dynamic_programming", "core")]
        for name, backend in itertools.product(("ilp", "ilp:core"), BACKENDS):
            exact.append(solve(problem, name, backend=backend))
        for solution in exact:
            check(problem, solution)
            assert solution.status == "optimal", (seed, solution.solver)
            assert solution.cost == pytest.approx(best, abs=tolerance), (seed, solution.solver)
        searched += exact[1].details["core"] > 0

        for name in HEURISTICS:
            try:
                solution = solve(problem, name)
            except BudgetError:
                assert name == "uniform", seed
                continue
            check(problem, solution)
            assert best <= solution.cost + tolerance, (seed, name)

        shuffled = reordered(problem, rng.permutation(problem.channels))
        larger = problem.with_budget(problem.budget + int(rng.integers(0, 20)))
        for name in ("dynamic_programming", "core"):
            assert solve(shuffled, name).cost == pytest.approx(best, abs=tolerance), (seed, name)
            assert solve(larger, name).cost <= best + tolerance, (seed, name)
        bound = relax(problem).lower_bound
        assert relax(shuffled).lower_bound == pytest.approx(bound, abs=tolerance), seed
        assert relax(larger).lower_bound <= bound + tolerance, seed
    print(f"{SEEDS} instances, of which {searched} left a core to be searched")
    assert searched > SEEDS / 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1185, 1344, 2392, 3359])
def test_a_warm_start_is_not_taken_for_the_optimum(seed: int, backend: str) -> None:
    # CBC returned the start that it was given, and called it optimal.
    problem = random_problem(np.random.default_rng(seed))
    solution = solve(problem, "ilp", backend=backend)
    assert solution.cost == pytest.approx(brute_force(problem), abs=close(problem))


def test_what_a_warm_start_becomes_while_presolving_is_returned() -> None:
    # HiGHS with presolve reported the optimum's objective, and returned the start.
    problem = AllocationProblem(
        costs=np.array([[0, 0, 0], [0, 0, 0.25], [0, 0, 1], [0, 0, 0]]),
        sizes=np.array([[0, 0, 1], [1, 3, 0], [3, 3, 0], [1, 1, 3]]),
        budget=3,
        multiples=np.array([1, 2, 1]),
    )
    assert solve(problem, "ilp").cost == brute_force(problem) == 1.0


def test_bounds_hold_where_rounding_decides_between_options() -> None:
    # By cancellation the dual value of -3 at 2,002 bytes is less than that of 0 at 18 bytes.
    problem = AllocationProblem(
        costs=np.array([[-3.0, 0.0]]), sizes=np.array([[2002, 18]]), budget=18
    )
    check(problem, solve(problem, "greedy:marginal"))
    # 1 - 1.2e-38 rounds to 1: two equally large options look equally steep.
    problem = AllocationProblem(
        costs=np.array([[1.0, 1.2e-38, 0.0]]), sizes=np.array([[0, 1, 1]]), budget=1
    )
    assert sweep(problem, [1]).lower_bound[0] <= 0.0 == solve(problem).cost


def test_costs_next_to_nothing_do_not_overflow() -> None:
    problem = AllocationProblem(
        costs=np.array([[0, 0, 0], [0, 2.3e-308, 0], [1.0, 0, 1]]),
        sizes=np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
        budget=0,
        multiples=np.array([1, 2, 1]),
    )
    solution = solve(problem, "ilp")
    check(problem, solution)
    assert solution.cost == pytest.approx(brute_force(problem), abs=1e-300)
