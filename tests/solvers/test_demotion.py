import heapq
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from qvla_jax.solvers import AllocationProblem, solve

from .problems import instances_tried, small_problems  # noqa: TID251

RELEASED = Path(__file__).parent / "data" / "released_gates.npz"
"""Costs of 58 channels of four small layers, and the gates that the released code gave them,
exact ties among them: two equal rows and a zero row."""


@pytest.mark.parametrize("target", [3.0, 4.0, 6.0, 10.0])
@pytest.mark.parametrize(
    ("prefix", "bits"), [("avg", (0, 2, 4, 8, 16)), ("bits0248_avg", (0, 2, 4, 8))]
)
def test_released_repeats_the_release(prefix: str, bits: tuple[int, ...], target: float) -> None:
    with np.load(RELEASED) as recorded:
        costs = np.stack([recorded[f"proxy_{b}"] for b in bits], axis=1).astype(np.float64)
        gates = recorded[f"gates_{prefix}{target}"]
    sizes = np.tile(np.array(bits), (len(costs), 1))
    budget = int(target * len(costs))
    problem = AllocationProblem(costs=costs, sizes=sizes, budget=budget)
    solution = solve(problem, "greedy:released")
    np.testing.assert_array_equal(np.array(bits)[solution.choice], gates)


def demote_with_a_heap(problem: AllocationProblem, *, rise: bool) -> np.ndarray:
    """The rule as a heap runs it, one demotion at a time."""
    walks: list[list[int]] = []
    for c in range(problem.channels):
        by_size: dict[int, int] = {}
        for j in range(problem.options):
            if problem.allowed is not None and not problem.allowed[c, j]:
                continue
            size = int(problem.sizes[c, j])
            if size not in by_size or problem.costs[c, j] < problem.costs[c, by_size[size]]:
                by_size[size] = j
        walks.append([by_size[size] for size in sorted(by_size, reverse=True)])
    level = [0] * problem.channels
    pushes = itertools.count()
    heap: list[tuple[float, int, int]] = []

    def push(c: int) -> None:
        if level[c] + 1 == len(walks[c]):
            return
        here, there = walks[c][level[c]], walks[c][level[c] + 1]
        saved = problem.sizes[c, here] - problem.sizes[c, there]
        cost = problem.costs[c, there] - (problem.costs[c, here] if rise else 0.0)
        heapq.heappush(heap, (float(cost / saved), next(pushes), c))

    for c in range(problem.channels):
        push(c)
    size = sum(int(problem.sizes[c, walk[0]]) for c, walk in enumerate(walks))
    while size > problem.budget:
        _, _, c = heapq.heappop(heap)
        size -= int(problem.sizes[c, walks[c][level[c]]] - problem.sizes[c, walks[c][level[c] + 1]])
        level[c] += 1
        push(c)
    return np.array([walk[at] for walk, at in zip(walks, level, strict=True)])


@instances_tried(150)
@given(small_problems(max_channels=10, max_options=6))
def test_computed_pop_order_is_that_of_a_heap(problem: AllocationProblem) -> None:
    for name, rise in (("greedy:qvla", True), ("greedy:released", False)):
        solution = solve(problem, name, unit="byte")
        expected = demote_with_a_heap(problem, rise=rise)
        np.testing.assert_array_equal(
            np.take_along_axis(problem.sizes, solution.choice[:, None], axis=1)[:, 0],
            np.take_along_axis(problem.sizes, expected[:, None], axis=1)[:, 0],
        )
        assert solution.cost == pytest.approx(problem.cost_of(expected))


def test_released_rule_differs_from_the_papers_on_absolute_costs() -> None:
    # The second channel is dear at any width: by absolute cost its cheap first step is not taken.
    costs = np.array([[3.0, 2.0, 0.0], [9.0, 5.1, 5.0]])
    sizes = np.array([[0, 2, 4], [0, 2, 4]])
    problem = AllocationProblem(costs=costs, sizes=sizes, budget=6)
    assert solve(problem, "greedy:qvla").choice.tolist() == [2, 1]
    assert solve(problem, "greedy:released").choice.tolist() == [1, 2]
