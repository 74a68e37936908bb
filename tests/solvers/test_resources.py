import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import (
    AllocationProblem,
    Resource,
    count_of,
    instances,
    paired_rows,
    relax,
    row_blocks,
    solve,
    tie,
    verify,
)
from qvla_jax.solvers.pricing import relax_all

from .problems import brute_force, check, close, instances_tried, small_problems  # noqa: TID251


@st.composite
def with_resources(draw: st.DrawFn) -> AllocationProblem:
    problem = draw(small_problems())
    resources = []
    for name in ("BitOps", "nanoseconds")[: draw(st.integers(1, 2))]:
        seed = draw(st.integers(0, 10**6))
        use = np.random.default_rng(seed).integers(0, 20, problem.costs.shape)
        open_use = use if problem.allowed is None else np.where(problem.allowed, use, 10**6)
        least = int(open_use.min(axis=1).sum())
        most = int(use.max(axis=1).sum())
        limit = least + int(draw(st.floats(0, 1)) * max(0, most - least))
        resources.append(Resource(name, use, limit))
    return dataclasses.replace(problem, resources=tuple(resources))


@instances_tried(40)
@given(with_resources())
def test_several_budgets_agree_with_brute_force(problem: AllocationProblem) -> None:
    best = brute_force(problem)
    if best is None:
        for name in ("ilp", "lagrangian"):
            with pytest.raises(BudgetError):
                solve(problem, name)
        return
    assert relax_all(problem).relaxation.lower_bound <= best
    solution = solve(problem, "ilp")
    check(problem, solution)
    assert solution.cost == pytest.approx(best, abs=close(problem))
    assert solution.status == "optimal"
    try:
        heuristic = solve(problem, "lagrangian")
    except BudgetError:
        return
    check(problem, heuristic)
    assert heuristic.cost >= best - close(problem)


def test_prices_bring_the_bound_close_at_a_larger_scale() -> None:
    problem = instances.openvla_like(scale=0.01, seed=2)
    bits = np.array([0, 2, 4, 8, 16])
    operations = np.broadcast_to(bits, problem.costs.shape) * 16
    alone = solve(problem, "lagrangian")
    free = int(operations[np.arange(problem.channels), alone.choice].sum())
    problem = dataclasses.replace(
        problem, resources=(Resource("BitOps", operations, int(0.8 * free)),)
    )
    solution = solve(problem, "lagrangian")
    check(problem, solution)
    assert solution.prices[0] > 0
    assert verify(problem, solution).bound_proof == "multiplier"
    # Disregarding the second budget, the bound says little; priced, it nearly is the optimum.
    assert relax(problem).lower_bound < 0.9 * solution.cost
    assert solution.gap < 1e-3


def test_a_fixed_share_of_pruned_channels() -> None:
    problem = instances.openvla_like(scale=0.005, seed=3)
    wanted = problem.channels // 5
    shape = (problem.channels, problem.options)
    fixed = dataclasses.replace(problem, resources=count_of(0, shape, least=wanted, most=wanted))
    solution = solve(fixed, "lagrangian")
    check(fixed, solution)
    assert int((solution.choice == 0).sum()) == wanted
    assert solution.gap < 1e-2
    with pytest.raises(InputError, match=r"must be 0 \.\."):
        count_of(0, shape, most=-1)


def test_contradicting_budgets_are_an_error() -> None:
    costs, sizes = np.array([[1.0, 2.0]]), np.array([[1, 0]])
    use = np.array([[0, 1]])
    with pytest.raises(BudgetError, match="limit of -1 on time cannot be met"):
        AllocationProblem(costs=costs, sizes=sizes, budget=0, resources=(Resource("t", use, 0),
            Resource("time", use, -1)))  # fmt: skip
    problem = AllocationProblem(
        costs=costs, sizes=sizes, budget=0, resources=(Resource("time", use, 0),)
    )
    for name in ("lagrangian", "ilp"):
        with pytest.raises(BudgetError):
            solve(problem, name)
    with pytest.raises(InputError, match="use evolutionary or ilp or lagrangian"):
        solve(problem, "core")


def test_unusable_resources_are_refused() -> None:
    with pytest.raises(InputError, match="integers"):
        Resource("time", np.ones((2, 2)), 1)
    with pytest.raises(InputError, match="must not be negative"):
        Resource("time", -np.ones((2, 2), dtype=int), 1)
    problem = instances.random_instance("monotone", channels=3)
    with pytest.raises(InputError, match="must have shape"):
        dataclasses.replace(problem, resources=(Resource("t", np.ones((2, 2), dtype=int), 9),))
    with pytest.raises(InputError, match="multiples must be positive"):
        dataclasses.replace(problem, multiples=np.zeros(5, dtype=int))


def test_all_constraints_survive_a_file(tmp_path: Path) -> None:
    problem = instances.openvla_like(scale=0.001)
    problem = dataclasses.replace(
        problem,
        multiples=np.array([1, 2, 2, 2, 1]),
        resources=count_of(0, (problem.channels, problem.options), most=problem.channels),
    )
    problem.save(tmp_path / "p.safetensors")
    loaded = AllocationProblem.load(tmp_path / "p.safetensors")
    assert loaded.constraints == ("multiples", "resources")
    assert loaded.multiples is not None
    np.testing.assert_array_equal(loaded.multiples, [1, 2, 2, 2, 1])
    assert loaded.resources[0].limit == problem.resources[0].limit
    np.testing.assert_array_equal(loaded.resources[0].use, problem.resources[0].use)


def test_rows_and_heads_are_tied_by_name() -> None:
    problem = AllocationProblem(
        costs=np.arange(24.0).reshape(12, 2),
        sizes=np.tile([0, 1], (12, 1)),
        budget=6,
        groups=np.repeat([0, 1, 2], 4),
        group_names=("gate", "up", "q"),
    )
    pairs = paired_rows(problem, [("gate", "up")])
    assert pairs.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11]
    heads = row_blocks(problem, ["q"], 2)
    assert heads[8:].tolist() == [8, 8, 10, 10]
    assert tie(problem, pairs).problem.channels == 8
    with pytest.raises(InputError, match="did you mean gate"):
        paired_rows(problem, [("gat", "up")])
    with pytest.raises(InputError, match="not whole blocks of 3"):
        row_blocks(problem, ["q"], 3)
    tiled = dataclasses.replace(problem, multiples=np.array([1, 2]))
    assert tie(tiled, pairs).problem.constraints == ("multiples",)
    by_heads = tie(tiled, heads).problem
    assert by_heads.group_names == ("gate", "up", "q")
    assert by_heads.multiples.tolist() == [[1, 2], [1, 2], [1, 1]]  # a head is a whole tile
    assert tie(tiled, pairs).problem.group_names == ("gate+up", "q")
    heads[-1] = 99
    with pytest.raises(InputError, match=r"Group 2 \(q\) holds parts of unlike sets"):
        tie(tiled, heads)


@st.composite
def tied_and_tiled(draw: st.DrawFn) -> tuple[AllocationProblem, np.ndarray]:
    """Rows paired over two groups and heads within a third one, tiles that differ by group."""
    pairs, heads, width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels, options = 2 * pairs + heads * width, 3
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = np.sort(rng.integers(0, 9, (channels, options)), axis=1)
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    bitops = rng.integers(0, 9, (channels, options))
    problem = AllocationProblem(
        costs=rng.integers(0, 30, (channels, options)).astype(float),
        sizes=sizes,
        budget=low + int(draw(st.floats(0, 1)) * (high - low)),
        groups=np.repeat([0, 1, 2], [pairs, pairs, heads * width]),
        group_names=("gate", "up", "q"),
        minimums=rng.integers(0, 2, 3),
        multiples=rng.integers(1, 3, draw(st.sampled_from([(options,), (3, options)]))),
    )
    if draw(st.booleans()):
        least = np.where(problem.allowed, bitops, 99).min(axis=1).sum()
        limit = int(least + draw(st.integers(0, 20)))
        problem = dataclasses.replace(problem, resources=(Resource("BitOps", bitops, limit),))
    labels = row_blocks(problem, ["q"], width)
    labels[: 2 * pairs] = paired_rows(problem, [("gate", "up")])[: 2 * pairs]
    return problem, labels


@instances_tried(60)
@given(st.data())
def test_ties_tiles_minimums_and_budgets_together_agree_with_brute_force(
    data: st.DataObject,
) -> None:
    try:
        problem, labels = data.draw(tied_and_tiled())
    except BudgetError:  # the minimums alone exceed the bytes
        return
    best = brute_force(problem, labels)
    if best is None:
        with pytest.raises(InputError):
            solve(tie(problem, labels).problem, "ilp")
        return
    tied = tie(problem, labels)
    solution = solve(tied.problem, "ilp")
    check(tied.problem, solution)
    choice = tied.expand(solution.choice)
    assert problem.violation(choice) is None
    assert problem.cost_of(choice) == pytest.approx(best, abs=close(problem))
    if tied.problem.constraints == ("multiples",):
        assert solution.details["price"] >= -close(problem)
        try:
            heuristic = solve(tied.problem, "greedy:aligned")
        except InputError:
            return
        check(tied.problem, heuristic)
        assert heuristic.cost >= best - close(problem)
