import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvla_jax import cli
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers import instances, pareto, solve


def test_points_are_the_solvers_solutions_above_the_bound() -> None:
    problem = instances.openvla_like(scale=0.001, seed=1)
    points = pareto(problem, ("uniform", "greedy:marginal"), budgets=6)
    assert (np.diff(points.budgets) > 0).all()
    for at, budget in enumerate(points.budgets.tolist()):
        solution = solve(problem.with_budget(budget), "greedy:marginal")
        assert points.cost["greedy:marginal"][at] == solution.cost
        assert points.size["greedy:marginal"][at] == solution.size <= budget
        assert points.lower_bound[at] <= solution.cost * (1 + 1e-12)
        assert points.lower_bound[at] == pytest.approx(solution.lower_bound, rel=1e-9, abs=1e-15)
    # Pruning everything is a uniform option, so the least budget already has a point.
    assert np.isfinite(points.cost["uniform"]).all()


def test_a_solver_without_an_answer_leaves_a_gap() -> None:
    problem = instances.random_instance("uncorrelated", channels=50, seed=0)
    least, most = problem.minimum_size, problem.maximum_size
    points = pareto(problem, ["uniform"], budgets=[most, least])
    assert points.budgets.tolist() == [least, most]
    assert np.isnan(points.cost["uniform"]).tolist() == [True, False]
    assert points.to_json()["cost"]["uniform"][0] is None
    with pytest.raises(BudgetError):
        pareto(problem, ["uniform"], budgets=[least - 1])
    with pytest.raises(InputError, match="unknown solver"):
        pareto(problem, ["unifrom"])


def test_the_command_prints_the_table_and_draws_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = instances.openvla_like(scale=0.001, seed=1)
    problem.save(tmp_path / "problem.npz")
    figure = tmp_path / "pareto.png"
    arguments = ("--solvers", "core", "greedy:marginal", "--figure", figure)
    arguments = ("compare-solvers", tmp_path / "problem.npz", *arguments, "--budgets", "4")
    assert cli.main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{problem.channels:,} channels x 5 options")
    assert [line.split()[0] for line in lines[2:4]] == ["core", "greedy:marginal"]
    assert cli.main([*(str(argument) for argument in arguments), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["result"]
    costs = {row["label"]: row["cost"] for row in content["solvers"]}
    assert costs["core"] == solve(problem, "core").cost
    assert len(content["pareto"]["budgets"]) == 4
    with Image.open(figure) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 300
    assert (pixels < 128).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a folder, nor a problem file"),
        (["nowhere.npz"], "there is no such file"),
        (["monotone", "--budget-bits", "4"], "budgets of their own"),
        (["monotone", "--figure", "x.pdf"], "must end in .png"),
        (["monotone", "--solvers", "greedy:margina"], "did you mean greedy:marginal"),
        (["."], "qvla sensitivity"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare-solvers", *arguments]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_integer_programming_refuses_what_it_could_not_build() -> None:
    problem = instances.random_instance("monotone", channels=30, seed=0)
    with pytest.raises(InputError, match="use ilp:core or core"):
        solve(problem, "ilp", max_channels=29)
