import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import AllocationProblem, Solution, compare, instances, relax, solve, verify

COSTS = np.array([[3.0, 1.0, 0.0], [2.0, 0.5, 0.0]])
SIZES = np.array([[1, 4, 8], [2, 4, 8]])


def make(**changes: object) -> AllocationProblem:
    return AllocationProblem(**{"costs": COSTS, "sizes": SIZES, "budget": 12, **changes})


def test_import_leaves_jax_and_solver_libraries_alone() -> None:
    code = "import sys, qvla_jax.solvers; print({'jax', 'pulp', 'safetensors'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_all_but_evolution_runs_where_jax_cannot_be_imported() -> None:
    code = """
import sys
for name in ("jax", "jaxlib", "flax", "evosax"):
    sys.modules[name] = None
from qvla_jax import solvers
problem = solvers.instances.random_instance("monotone", channels=20)
for name in set(solvers.available()) - {"evolutionary"}:
    assert solvers.verify(problem, solvers.solve(problem, name)).ok
def evaluate(choices):
    return choices.sum(axis=1)
print(solvers.local_search(problem, evaluate, rounds=2).evaluations > 1)
print(len(solvers.sweep(problem, 5).budgets), len(solvers.compare(problem).rows))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["True", "5", "10"]


def test_an_infeasible_budget_states_the_minimum() -> None:
    with pytest.raises(BudgetError, match="at least 3 bytes"):
        make(budget=2)
    assert solve(make(budget=3)).choice.tolist() == [0, 0]
    with pytest.raises(BudgetError, match=r"at least 10 bytes, or relax `fixed` and `minimums`"):
        make(budget=8, fixed=np.array([2, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": np.array([[0.0, 1, 2], [3, np.nan, 5]])}, "channel 1, option 1 is nan"),
        ({"costs": np.array([[0.0, 1, 2], [3, 4, -np.inf]])}, "channel 1, option 2 is -inf"),
        ({"costs": np.full((2, 3), 1e308)}, "rescale"),
        ({"costs": np.zeros(3)}, r"shape \[channels, options\]"),
        ({"costs": np.zeros((0, 3))}, r"none of them 0"),
        ({"costs": [["a"]]}, "array of numbers"),
        ({"sizes": -SIZES}, "channel 0, option 0 is -1 bytes"),
        ({"sizes": SIZES.astype(float)}, "integers, got float64"),
        ({"sizes": SIZES[:1]}, r"sizes must have shape \(2, 3\), got \(1, 3\)"),
        ({"sizes": np.full((2, 3), 2**53)}, "2\\*\\*53"),
        ({"budget": 12.0}, "whole number of bytes"),
        ({"budget": True}, "whole number of bytes"),
        ({"fixed": np.array([0, 3])}, "channel 1 has 3"),
        ({"minimums": np.array([1])}, "needs `groups`"),
        ({"groups": np.array([0, 2]), "group_names": ("a", "b")}, r"0 \.\. 1"),
        ({"groups": np.array([0, -1])}, "from -1 to 0"),
        ({"groups": np.array([0, 0]), "minimums": np.array([3])}, r"options 0 \.\. 2"),
        (
            {
                "groups": np.array([0, 1]),
                "group_names": ("vision.qkv", "llama.down"),
                "minimums": np.array([0, 1]),
                "fixed": np.array([-1, 0]),
            },
            r"channel 1 \(llama.down, row 0\) has no option left",
        ),
    ],
)
def test_invalid_problems_say_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_arrays_become_read_only_and_the_callers_stay_writable() -> None:
    costs = COSTS.copy()
    problem = make(costs=costs)
    with pytest.raises(ValueError, match="read-only"):
        problem.costs[0, 0] = 1
    costs[0, 0] = 7.0


def test_fixed_and_minimums_close_options() -> None:
    problem = make(
        fixed=np.array([-1, 2]), groups=np.array([1, 0]), minimums=np.array([0, 1]), budget=16
    )
    assert problem.allowed is not None
    assert problem.allowed.tolist() == [[False, True, True], [False, False, True]]
    assert (problem.minimum_size, problem.maximum_size) == (12, 16)


def test_summary_counts_what_is_unusual() -> None:
    costs = np.array([[3.0, 1, 2], [0, 0, 0], [2, 1, -1]])
    sizes = np.array([[0, 2, 4], [1, 1, 3], [0, 1, 2]])
    summary = AllocationProblem(costs=costs, sizes=sizes, budget=9).summary()
    assert summary.non_monotone_channels == 1
    assert summary.zero_cost_channels == 1
    assert summary.equal_size_channels == 1
    assert summary.negative_cost_channels == 1
    assert summary.dominated_options == 3
    assert (summary.minimum_size, summary.maximum_size) == (1, 9)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    problem = make(
        groups=np.array([0, 1]),
        group_names=("a", "b"),
        fixed=np.array([-1, 1]),
        minimums=np.array([1, 0]),
    )
    problem.save(tmp_path / f"problem{suffix}")
    loaded = AllocationProblem.load(tmp_path / f"problem{suffix}")
    for name in ("costs", "sizes", "groups", "fixed", "minimums"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(problem, name))
    assert (loaded.budget, loaded.group_names) == (problem.budget, problem.group_names)

    solution = solve(problem)
    solution.save(tmp_path / f"solution{suffix}")
    again = Solution.load(tmp_path / f"solution{suffix}")
    assert again.to_json() == solution.to_json()
    assert verify(loaded, again).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"problem{suffix}",
        f"solution{suffix}",
    ]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"problem{suffix}"
    with pytest.raises(InputError, match=f"problem{suffix}: there is no such file"):
        AllocationProblem.load(path)
    make().save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"problem{suffix}: the file is damaged"):
            AllocationProblem.load(path)
    solve(make()).save(path)
    with pytest.raises(InputError, match="expected a file of kind"):
        AllocationProblem.load(path)
    with pytest.raises(InputError, match="must end in"):
        make().save(tmp_path / "problem.pt")


def test_compare_prints_a_row_for_each_solver_and_keeps_going() -> None:
    problem = instances.random_instance("uncorrelated", channels=50, tightness=0.001, seed=0)
    comparison = compare(problem, settings={"dynamic_programming": {"max_states": 10}})
    table = str(comparison)
    assert "greedy:marginal" in table
    assert "more than max_states = 10" in table
    rows = {row.label: row for row in comparison.rows}
    assert rows["dynamic_programming"].solution is None
    assert rows["uniform"].solution is None
    assert rows["core"].solution is not None
    assert comparison.lower_bound == rows["core"].solution.cost
    assert len(comparison.to_json()) == len(rows)
    with pytest.raises(InputError, match="no setting sped"):
        compare(problem, ["uniform"], settings={"uniform": {"sped": 1}})


def test_a_relaxation_for_another_budget_is_refused() -> None:
    problem = instances.random_instance("monotone", channels=9, seed=1)
    relaxation = relax(problem)
    given = solve(problem, "uniform", relaxation=relaxation)
    assert given.lower_bound == solve(problem, "uniform").lower_bound
    with pytest.raises(InputError, match="their bounds differ"):
        solve(problem.with_budget(problem.budget + 1), "uniform", relaxation=relaxation)


def test_instances_repeat_for_a_seed() -> None:
    for family in instances.families():
        one = instances.random_instance(family, channels=5, seed=1)
        two = instances.random_instance(family, channels=5, seed=1)
        np.testing.assert_array_equal(one.costs, two.costs)
    with pytest.raises(InputError, match="did you mean subset_sum"):
        instances.random_instance("subsetsum")
    problem = instances.openvla_like(scale=0.001)
    assert problem.group_names is not None
    assert problem.group_names[0] == "dinov2.qkv.0"
