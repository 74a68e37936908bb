import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax.errors import InputError
from qvla_jax.solvers import (
    AllocationProblem,
    SearchResult,
    count_of,
    evolve,
    instances,
    local_search,
    solve,
)

from .problems import brute_force, check, instances_tried, small_problems  # noqa: TID251

SEARCHES = (evolve, local_search)


def modular(scale: float = 0.001, seed: int = 1) -> AllocationProblem:
    """About twenty modules: a strategy in few dimensions compiles quickly."""
    problem = instances.openvla_like(scale=scale, seed=seed)
    assert problem.groups is not None
    return dataclasses.replace(problem, groups=problem.groups // 16, group_names=None)


class Measured:
    """Modules weigh otherwise than the costs say, and their errors add up before they are squared.

    It checks that every candidate is feasible.
    """

    def __init__(self, problem: AllocationProblem, seed: int = 0):
        self.problem, self.calls = problem, 0
        self.weights = np.exp(np.random.default_rng(seed).normal(0, 1, problem.group_count))

    def __call__(self, choices: np.ndarray) -> np.ndarray:
        self.calls += len(choices)
        return np.array([self.of(choice) for choice in choices])

    def of(self, choice: np.ndarray) -> float:
        assert self.problem.violation(choice) is None
        errors = self.problem.costs[np.arange(len(choice)), choice]
        modules = np.bincount(self.problem.groups, errors, self.problem.group_count)
        return float((self.weights * modules).sum() + (modules**2).sum() / modules.max())


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_improves_on_the_separable_solution(search: Callable[..., SearchResult]) -> None:
    problem = modular()
    measure = Measured(problem)
    separable = solve(problem).choice
    found = search(problem, measure)
    assert found.start_error == measure.of(separable)
    assert found.error == measure.of(found.choice) < 0.99 * found.start_error
    assert problem.cost_of(found.choice) >= problem.cost_of(separable)  # it left that optimum
    assert (np.diff(found.history) <= 0).all()
    assert found.history[-1] == found.error
    again = search(problem, Measured(problem))
    np.testing.assert_array_equal(again.choice, found.choice)


def test_snes_searches_as_well() -> None:
    problem = modular()
    found = evolve(problem, Measured(problem), algorithm="snes", generations=10)
    assert found.error < 0.99 * found.start_error


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_keeps_constraints_and_its_start(search: Callable[..., SearchResult]) -> None:
    problem = modular(seed=2)
    rng = np.random.default_rng(0)
    limited = dataclasses.replace(
        problem,
        fixed=np.where(rng.random(problem.channels) < 0.1, 3, -1),
        resources=count_of(0, problem.costs.shape, most=problem.channels // 20),
    )
    rounds = {"generations": 2} if search is evolve else {"rounds": 4}
    # The objective asserts that each candidate is feasible.
    found = search(limited, Measured(limited), population=4, **rounds)
    assert found.error <= found.start_error
    start = problem.sizes.argmin(axis=1)
    kept = search(problem, lambda choices: np.where((choices == start).all(axis=1), 0.0, np.nan),
                  start=start, population=4, **rounds)  # fmt: skip
    assert kept.error == 0
    np.testing.assert_array_equal(kept.choice, start)


def test_evolution_keeps_counts_in_multiples_and_swaps_refuse_them() -> None:
    problem = modular(scale=0.002, seed=2)
    problem = dataclasses.replace(problem, multiples=np.array([1, 4, 4, 4, 1]))
    found = evolve(problem, Measured(problem), generations=2)
    assert found.error <= found.start_error
    with pytest.raises(InputError, match="a swap breaks the counts"):
        local_search(problem, Measured(problem))


@instances_tried(60)
@given(small_problems(), st.integers(0, 1000))
def test_swaps_stay_feasible_and_are_never_worse(problem: AllocationProblem, seed: int) -> None:
    table = np.random.default_rng(seed).random(problem.costs.shape)
    index = np.arange(problem.channels)
    best = brute_force(dataclasses.replace(problem, costs=table))

    def evaluate(choices: np.ndarray) -> np.ndarray:
        assert all(problem.violation(choice) is None for choice in choices)
        return table[index, choices].sum(axis=1)

    found = local_search(problem, evaluate, rounds=4, population=4, seed=seed)
    assert best <= found.error + 1e-12
    assert found.error <= found.start_error


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_stays_small_for_many_channels(search: Callable[..., SearchResult]) -> None:
    # All 300 modules of OpenVLA, and 55,000 channels.
    problem = instances.openvla_like(scale=0.03, seed=3)
    rounds = {"generations": 1} if search is evolve else {"rounds": 1}
    measure = Measured(problem)
    found = search(problem, measure, population=4, **rounds)
    assert found.error == measure.of(found.choice) <= found.start_error
    assert 2 <= found.evaluations <= 5


@pytest.mark.parametrize("search", SEARCHES)
def test_no_candidate_is_measured_twice(search: Callable[..., SearchResult]) -> None:
    problem = instances.random_instance("monotone", channels=6, seed=1)
    problem = dataclasses.replace(problem, groups=np.arange(6) // 3)
    measure = Measured(problem)
    assert search(problem, measure).evaluations == measure.calls


@pytest.mark.parametrize("search", SEARCHES)
def test_unusable_searches_are_refused(search: Callable[..., SearchResult]) -> None:
    problem = instances.random_instance("monotone", channels=6, seed=1)
    with pytest.raises(InputError, match="no feasible choice: it takes"):
        search(problem, len, start=problem.sizes.argmax(axis=1))
    with pytest.raises(InputError, match="must choose for 6 channels"):
        search(problem, len, start=np.zeros(5, dtype=int))
    with pytest.raises(InputError, match="must return 1 errors"):
        search(problem, lambda choices: np.zeros((len(choices), 2)))
    with pytest.raises(InputError, match="gives inf for the start"):
        search(problem, lambda choices: np.full(len(choices), np.nan))
    with pytest.raises(InputError, match="population"):
        search(problem, len, population=0)
    with pytest.raises(InputError, match="one of cma_es, snes"):
        evolve(problem, len, algorithm="genetic")


def test_evolution_on_the_summed_cost_takes_part_in_comparisons() -> None:
    problem = modular(scale=0.0005, seed=3)
    solution = solve(problem, "evolutionary", generations=3)
    check(problem, solution)
    assert solution.cost <= solve(problem, "greedy:marginal").cost
    assert solution.details["start_cost"] >= solution.cost
