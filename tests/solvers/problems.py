"""Small random problems, brute force, and what every solution must satisfy."""

import itertools
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qvla_jax.solvers import AllocationProblem, Solution, verify
from qvla_jax.solvers.programs import cbc_path

HEURISTICS = ("uniform", "greedy:qvla", "greedy:released", "greedy:marginal", "lagrangian")
ALIGNED = ("greedy:aligned",)
SEARCHES = ("evolutionary",)
# CBC comes with PuLP up to version 3 only, or as a package of its own.
BACKENDS = ("highs", "cbc") if cbc_path() else ("highs",)
EXACT = ("dynamic_programming", "core", "ilp", "ilp:core")

# `make prove-solvers` multiplies the instances of every property.
FACTOR = int(os.environ.get("QVLA_PROOF_FACTOR", "1"))


def instances_tried(count: int) -> settings:
    """How many instances a property is tried on."""
    return settings(
        max_examples=count * FACTOR,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@st.composite
def small_problems(
    draw: st.DrawFn, *, max_channels: int = 5, max_options: int = 4, constrained: bool = True
) -> AllocationProblem:
    """Ties, zeros, equal sizes, non-monotone and negative costs, closed options: all likely."""
    channels = draw(st.integers(1, max_channels))
    options = draw(st.integers(1, max_options))
    shape = (channels, options)
    sizes = np.array(draw(_table(st.integers(0, draw(st.sampled_from([3, 12, 5000]))), shape)))
    cost = draw(
        st.sampled_from(
            [
                st.integers(0, 3),
                st.integers(-5, 5),
                st.floats(0, 1, allow_subnormal=False),
                st.floats(-8, 3).map(lambda x: 10.0**x),
            ]
        )
    )
    costs = np.array(draw(_table(cost, shape)), dtype=np.float64)
    fixed = groups = minimums = None
    if constrained and draw(st.booleans()):
        groups = np.array(draw(st.lists(st.integers(0, 1), min_size=channels, max_size=channels)))
        minimums = np.array([draw(st.integers(0, options - 1)) for _ in range(groups.max() + 1)])
        lowest = minimums[groups]
        fixed = np.array([draw(st.sampled_from([-1, -1, *range(low, options)])) for low in lowest])
    keywords = {"groups": groups, "minimums": minimums, "fixed": fixed}
    loose = AllocationProblem(costs=costs, sizes=sizes, budget=2**40, **keywords)
    tightness = draw(st.floats(0, 1.1))
    span = loose.maximum_size - loose.minimum_size
    return loose.with_budget(loose.minimum_size + int(tightness * span))


def brute_force(problem: AllocationProblem, labels: np.ndarray | None = None) -> float | None:
    """The least cost of all allocations, None where no allocation is feasible.

    Channels with equal `labels` share their option.
    """
    rows = np.arange(problem.channels)
    sets, member = np.unique(rows if labels is None else labels, return_inverse=True)
    choices = np.array(list(itertools.product(range(problem.options), repeat=len(sets))))
    choices = choices[:, member]
    fits = problem.sizes[rows, choices].sum(axis=1) <= problem.budget
    if problem.allowed is not None:
        fits &= problem.allowed[rows, choices].all(axis=1)
    for resource in problem.resources:
        fits &= resource.use[rows, choices].sum(axis=1) <= resource.limit
    if problem.multiples is not None:
        groups = np.zeros(problem.channels, int) if problem.groups is None else problem.groups
        for group in np.unique(groups):
            multiples = (
                problem.multiples if problem.multiples.ndim == 1 else problem.multiples[group]
            )
            for option, multiple in enumerate(multiples):
                fits &= (choices[:, groups == group] == option).sum(axis=1) % multiple == 0
    if not fits.any():
        return None
    return float(problem.costs[rows, choices[fits]].sum(axis=1).min())


def check(problem: AllocationProblem, solution: Solution) -> None:
    """Feasible, and every claim of the certificate holds."""
    verification = verify(problem, solution)
    assert verification.ok, verification.failures
    # Only a search may claim more than the multiplier proves.
    assert verification.bound_proof == "multiplier" or solution.solver in EXACT
    assert solution.size <= problem.budget
    assert solution.lower_bound <= solution.cost + 1e-12 * (1 + abs(solution.cost))


def close(problem: AllocationProblem) -> float:
    """The absolute difference within which two costs of a problem count as equal."""
    return 1e-9 * float(np.abs(problem.costs).max(initial=1e-30))


def _table(values: st.SearchStrategy, shape: tuple[int, int]) -> st.SearchStrategy:
    row = st.lists(values, min_size=shape[1], max_size=shape[1])
    return st.lists(row, min_size=shape[0], max_size=shape[0])
