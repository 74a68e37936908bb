import dataclasses
import itertools
from random import Random

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import assume, given
from hypothesis import strategies as st

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import (
    AllocationProblem,
    available,
    fill,
    instances,
    programs,
    relax,
    solve,
    tie,
)
from qvla_jax.solvers.mip import solve_mip

from .problems import (  # noqa: TID251
    ALIGNED,
    BACKENDS,
    EXACT,
    HEURISTICS,
    SEARCHES,
    brute_force,
    check,
    close,
    instances_tried,
    small_problems,
)

quick = instances_tried(60)
# Every example starts HiGHS and CBC.
slow_solver = instances_tried(25)


def test_every_documented_solver_is_available() -> None:
    assert set(HEURISTICS + EXACT + ALIGNED + SEARCHES) == set(available())


@quick
@given(small_problems())
def test_dynamic_programming_and_core_agree_with_brute_force(problem: AllocationProblem) -> None:
    best = brute_force(problem)
    for name in ("dynamic_programming", "core"):
        solution = solve(problem, name)
        check(problem, solution)
        assert solution.status == "optimal"
        assert solution.cost == pytest.approx(best, abs=close(problem))


@slow_solver
@given(small_problems())
def test_integer_programming_agrees_with_brute_force(problem: AllocationProblem) -> None:
    best = brute_force(problem)
    for name, backend in itertools.product(("ilp", "ilp:core"), BACKENDS):
        solution = solve(problem, name, backend=backend)
        check(problem, solution)
        assert solution.status == "optimal"
        assert solution.cost == pytest.approx(best, abs=close(problem))


@instances_tried(15)
@given(st.sampled_from(instances.families()), st.integers(0, 10**6), st.floats(0.02, 0.98))
def test_exact_solvers_agree_on_larger_instances(family: str, seed: int, tightness: float) -> None:
    problem = instances.random_instance(
        family, channels=20, options=4, largest=100, tightness=tightness, seed=seed
    )
    best = solve(problem, "dynamic_programming")
    for name in ("core", "ilp", "ilp:core"):
        solution = solve(problem, name)
        check(problem, solution)
        assert solution.status == "optimal"
        assert solution.cost == pytest.approx(best.cost, abs=close(problem))
    assert best.lower_bound >= relax(problem).lower_bound


@quick
@given(small_problems())
def test_bound_below_optimum_below_every_heuristic(problem: AllocationProblem) -> None:
    best = brute_force(problem)
    assert relax(problem).lower_bound <= best
    for name in HEURISTICS:
        try:
            solution = solve(problem, name)
        except BudgetError:
            assert name == "uniform"
            continue
        check(problem, solution)
        assert solution.cost >= best - close(problem)


@quick
@given(small_problems(max_channels=12, constrained=False))
def test_bound_is_the_value_of_the_linear_relaxation(problem: AllocationProblem) -> None:
    channels, options = problem.costs.shape
    one_each = scipy.sparse.kron(scipy.sparse.eye(channels), np.ones((1, options)), format="csr")
    result = scipy.optimize.linprog(
        problem.costs.ravel(),
        A_ub=problem.sizes.reshape(1, -1),
        b_ub=[problem.budget],
        A_eq=one_each,
        b_eq=np.ones(channels),
    )
    assume(result.status == 0)
    scale = float(np.abs(problem.costs).sum()) + 1e-12
    assert relax(problem).lower_bound == pytest.approx(result.fun, abs=1e-6 * scale)


@quick
@given(small_problems(max_channels=10), st.randoms(use_true_random=False))
def test_order_of_the_channels_does_not_matter(problem: AllocationProblem, random: Random) -> None:
    order = np.array(random.sample(range(problem.channels), problem.channels))
    shuffled = AllocationProblem(
        costs=problem.costs[order],
        sizes=problem.sizes[order],
        budget=problem.budget,
        groups=None if problem.groups is None else problem.groups[order],
        minimums=problem.minimums,
        fixed=None if problem.fixed is None else problem.fixed[order],
    )
    assert relax(shuffled).lower_bound == pytest.approx(
        relax(problem).lower_bound, abs=close(problem)
    )
    assert solve(shuffled, "core").cost == pytest.approx(
        solve(problem, "core").cost, abs=close(problem)
    )


def test_heuristics_do_not_depend_on_the_order_of_the_channels() -> None:
    problem = instances.random_instance("heavy_tailed", channels=500, seed=7)
    order = np.random.default_rng(0).permutation(problem.channels)
    shuffled = AllocationProblem(
        costs=problem.costs[order], sizes=problem.sizes[order], budget=problem.budget
    )
    for name in HEURISTICS:
        there = solve(shuffled, name)
        np.testing.assert_array_equal(there.choice, solve(problem, name).choice[order])


@quick
@given(small_problems(max_channels=8), st.integers(0, 20))
def test_more_budget_never_hurts(problem: AllocationProblem, extra: int) -> None:
    larger = problem.with_budget(problem.budget + extra)
    for name in ("core", "dynamic_programming", "uniform"):
        try:
            before = solve(problem, name)
        except BudgetError:
            continue
        assert solve(larger, name).cost <= before.cost + close(problem)
    assert relax(larger).lower_bound <= relax(problem).lower_bound + close(problem)


@quick
@given(small_problems(max_channels=8))
def test_filling_improves_until_nothing_fits(problem: AllocationProblem) -> None:
    sizes = problem.sizes
    if problem.allowed is not None:
        sizes = np.where(problem.allowed, sizes, 2**50)
    start = sizes.argmin(axis=1)
    filled = fill(problem, start)
    slack = problem.budget - problem.size_of(filled)
    assert slack >= 0
    rows = np.arange(problem.channels)[:, None]
    added = sizes - problem.sizes[rows[:, 0], filled][:, None]
    cheaper = problem.costs < problem.costs[rows[:, 0], filled][:, None]
    assert not (cheaper & (added <= slack)).any()


@pytest.mark.parametrize("name", ["lagrangian", "greedy:marginal"])
@pytest.mark.parametrize("family", ["openvla", "heavy_tailed", "strongly_correlated", "monotone"])
def test_large_instances_are_solved_close_to_the_bound(name: str, family: str) -> None:
    if family == "openvla":
        problem = instances.openvla_like(scale=0.05, seed=3)
    else:
        problem = instances.random_instance(family, channels=50_000, seed=3)
    solution = solve(problem, name)
    check(problem, solution)
    assert solution.gap < 1e-5


def test_core_proves_optimality_where_integer_programming_would_not_end() -> None:
    problem = instances.openvla_like(scale=0.05, budget_bits=3.0, seed=1)
    solution = solve(problem, "core")
    check(problem, solution)
    assert solution.status == "optimal"
    assert solution.cost <= solve(problem, "greedy:marginal").cost


def test_core_that_runs_out_of_time_reports_a_valid_bound() -> None:
    problem = instances.random_instance("strongly_correlated", channels=300, seed=5)
    exact = solve(problem, "core")
    hurried = solve(problem, "core", time_limit=0.0)
    assert exact.status == "optimal"
    assert hurried.status == "time_limit"
    assert hurried.lower_bound <= exact.cost <= hurried.cost
    crowded = solve(problem, "core", max_states=3)
    assert crowded.lower_bound <= exact.cost <= crowded.cost


def test_ilp_by_group_gives_one_option_to_each_group() -> None:
    problem = instances.openvla_like(scale=0.002, seed=2)
    solution = solve(problem, "ilp", level="group")
    check(problem, solution)
    assert problem.groups is not None
    for group in range(problem.group_count):
        assert len(np.unique(solution.choice[problem.groups == group])) == 1
    assert solution.cost > solve(problem, "greedy:marginal").cost
    assert solution.status == "feasible"
    assert solution.details["mip_status"] == "optimal"


@slow_solver
@given(small_problems(constrained=False), st.data())
def test_ilp_by_group_finds_the_best_layer_wise_allocation(
    problem: AllocationProblem, data: st.DataObject
) -> None:
    sizes = st.lists(st.integers(0, 1), min_size=problem.channels, max_size=problem.channels)
    groups = np.unique(data.draw(sizes), return_inverse=True)[1]
    problem = dataclasses.replace(problem, groups=groups)
    best = brute_force(problem, groups)
    for backend in BACKENDS:
        if best is None:
            with pytest.raises(BudgetError):
                solve(problem, "ilp", level="group", backend=backend)
            continue
        solution = solve(problem, "ilp", level="group", backend=backend)
        check(problem, solution)
        assert solution.details["mip_status"] == "optimal"
        assert solution.cost == pytest.approx(best, abs=close(problem))


def test_a_warm_start_is_where_the_search_begins() -> None:
    problem = instances.random_instance("monotone", channels=100, seed=0)
    start = solve(problem, "greedy:marginal")
    opened = np.ones(problem.costs.shape, dtype=bool)
    given = problem.costs, problem.sizes, opened, problem.budget
    # With so wide a gap the search ends at the first solution that it has.
    warm = solve_mip(*given, incumbent=start.choice, gap=0.9)
    assert warm.choice is not None
    assert problem.cost_of(warm.choice) <= start.cost
    cold = solve_mip(*given, incumbent=start.choice, gap=0.9, warm_start=False)
    assert cold.choice is not None
    assert problem.cost_of(cold.choice) > start.cost


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_gap_is_reported_with_a_valid_bound(backend: str) -> None:
    problem = instances.random_instance("weakly_correlated", channels=100, seed=0)
    best = solve(problem, "core").cost
    solution = solve(problem, "ilp", gap=0.5, backend=backend)
    check(problem, solution)
    assert solution.status == "feasible"
    assert solution.lower_bound <= best <= solution.cost
    assert 0 < solution.gap <= 0.5
    assert solution.gap == pytest.approx(1 - solution.lower_bound / solution.cost)


def test_a_time_limit_is_reported() -> None:
    problem = instances.random_instance("strongly_correlated", channels=2000, seed=0)
    solution = solve(problem, "ilp", time_limit=0.2)
    check(problem, solution)
    assert solution.status == "time_limit"
    assert solution.cost <= solve(problem, "greedy:marginal").cost


def test_integer_programming_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    solve(instances.random_instance("monotone", channels=10, seed=1), "ilp")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_missing_cbc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "cbc_path", lambda: None)
    with pytest.raises(InputError, match="CBC is not installed: `pip install"):
        solve(instances.random_instance("monotone", channels=3), "ilp", backend="cbc")


def test_costs_of_any_scale_are_told_apart() -> None:
    problem = instances.random_instance("uncorrelated", channels=20, seed=4)
    for scale in (1e-12, 1.0, 1e12):
        scaled = AllocationProblem(
            costs=problem.costs * scale, sizes=problem.sizes, budget=problem.budget
        )
        best = solve(scaled, "dynamic_programming").cost
        for name in ("core", "ilp", "ilp:core"):
            assert solve(scaled, name).cost == pytest.approx(best, rel=1e-9)


def test_uniform_takes_the_cheapest_option_that_fits() -> None:
    costs = np.array([[9.0, 4.0, 5.0, 0.0]] * 3)
    sizes = np.array([[0, 2, 4, 8]] * 3)
    problem = AllocationProblem(costs=costs, sizes=sizes, budget=12, fixed=np.array([-1, -1, 2]))
    assert solve(problem, "uniform").choice.tolist() == [1, 1, 2]
    assert solve(problem, "uniform", option=2).choice.tolist() == [2, 2, 2]
    with pytest.raises(BudgetError, match="option 3 takes 20 bytes"):
        solve(problem, "uniform", option=3)
    with pytest.raises(InputError, match=r"0 \.\. 3"):
        solve(problem, "uniform", option=4)


def test_unknown_solvers_and_settings_name_the_known_ones() -> None:
    problem = instances.random_instance("monotone", channels=3)
    with pytest.raises(InputError, match="did you mean greedy:marginal"):
        solve(problem, "greedy:marginl")
    with pytest.raises(InputError, match="no setting speed; it has: direction"):
        solve(problem, "greedy:marginal", speed=3)
    with pytest.raises(InputError, match="'highs' or 'cbc'"):
        solve(problem, "ilp", backend="abacus")
    with pytest.raises(InputError, match="needs a problem with groups"):
        solve(problem, "ilp", level="group")
    with pytest.raises(InputError, match="more than max_states"):
        solve(problem, "dynamic_programming", max_states=1)


@quick
@given(small_problems(), st.data())
def test_tied_channels_share_their_option_at_least_cost(
    problem: AllocationProblem, data: st.DataObject
) -> None:
    label = st.integers(0, 2)
    size = problem.channels
    labels = np.array(data.draw(st.lists(label, min_size=size, max_size=size)))
    choices = [
        np.array(options)[np.unique(labels, return_inverse=True)[1]]
        for options in itertools.product(range(problem.options), repeat=len(np.unique(labels)))
    ]
    rows = np.arange(problem.channels)
    costs = [
        problem.cost_of(choice)
        for choice in choices
        if problem.size_of(choice) <= problem.budget
        and (problem.allowed is None or problem.allowed[rows, choice].all())
    ]
    if not costs:
        with pytest.raises(InputError):
            tie(problem, labels)
        return
    tied = tie(problem, labels)
    choice = tied.expand(solve(tied.problem, "core").choice)
    assert problem.size_of(choice) <= problem.budget
    assert problem.cost_of(choice) == pytest.approx(min(costs), abs=close(problem))


def test_conflicting_ties_are_refused() -> None:
    problem = instances.random_instance("monotone", channels=4, seed=1)
    torn = AllocationProblem(
        costs=problem.costs, sizes=problem.sizes, budget=10**6, fixed=np.array([0, -1, 1, -1])
    )
    with pytest.raises(
        InputError, match="channel 0 is fixed to option 0, and a channel tied to it"
    ):
        tie(torn, np.zeros(4, dtype=int))
    crossed = AllocationProblem(costs=np.zeros((2, 2)), sizes=np.array([[0, 4], [4, 0]]), budget=0)
    with pytest.raises(BudgetError, match=r"With tied channels: .* at least 4 bytes"):
        tie(crossed, np.zeros(2, dtype=int))
