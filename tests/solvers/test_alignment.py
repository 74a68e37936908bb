import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import AllocationProblem, instances, solve

from .problems import check, small_problems  # noqa: TID251


def counts_by_group(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    groups = np.zeros(problem.channels, dtype=int) if problem.groups is None else problem.groups
    counts = np.zeros((groups.max() + 1, problem.options), dtype=int)
    np.add.at(counts, (groups, choice), 1)
    return counts


@pytest.mark.parametrize(("multiple", "bits"), [(1, 3.0), (4, 6.0), (16, 3.0)])
def test_counts_are_multiples_and_the_price_is_small(multiple: int, bits: float) -> None:
    problem = instances.openvla_like(scale=0.03, budget_bits=bits, seed=1)
    solution = solve(problem, "greedy:aligned", multiple=multiple)
    check(problem, solution)
    counts = counts_by_group(problem, solution.choice)
    assert (counts[:, 1:-1] % multiple == 0).all()
    unaligned = solution.details["unaligned_cost"]
    assert solution.details["price"] == pytest.approx(solution.cost - unaligned)
    assert solution.cost < unaligned * (1.001 if multiple == 1 else 1.5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_problems(max_channels=9), st.integers(1, 4))
def test_counts_are_multiples_where_that_is_possible(
    problem: AllocationProblem, multiple: int
) -> None:
    try:
        solution = solve(problem, "greedy:aligned", multiple=multiple)
    except (BudgetError, InputError):
        assume(multiple == 1)  # which every problem allows
        raise
    check(problem, solution)
    counts = counts_by_group(problem, solution.choice)
    assert (counts[:, 1:-1] % multiple == 0).all()


def test_every_count_can_be_tiled_where_the_group_is_whole_tiles() -> None:
    problem = instances.random_instance("monotone", channels=64, seed=3)
    solution = solve(problem, "greedy:aligned", multiple=8, exempt=(-1,))
    assert (counts_by_group(problem, solution.choice) % 8 == 0).all()
    with pytest.raises(InputError, match="exempt must name"):
        solve(problem, "greedy:aligned", exempt=())
    with pytest.raises(InputError, match="must be positive"):
        solve(problem, "greedy:aligned", multiple=0)
