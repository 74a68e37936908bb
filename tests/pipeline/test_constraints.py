"""Constraints on a table of sensitivities: on the command line, and all together in Python."""

import dataclasses

import numpy as np
import pytest

from qvla_jax import cli
from qvla_jax.allocation import allocate, read_front
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations
from qvla_jax.quantization import InputStatistics, QuantizerSettings
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layout import option_sizes
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.solvers import Resource, paired_rows, row_blocks, solve, tie, verify

BITS = (0, 2, 4, 8, 16)
INDEX = ChannelIndex(
    tuple(
        LayerInfo(path=f"blocks.{block}.{name}", out_features=32, fan_in=64, has_bias=False)
        for block in (0, 1)
        for name in ("q_proj", "gate_proj", "up_proj")
    )
)
PATHS = np.array(INDEX.paths)[INDEX.layer_of]


@pytest.fixture
def table() -> SensitivityTable:
    rng = np.random.default_rng(0)
    importance = np.exp(rng.normal(0, 2, (len(INDEX), 1)))
    costs = importance * 4.0 ** -np.array(BITS) * rng.uniform(0.5, 2, (len(INDEX), len(BITS)))
    costs[:, -1] = 0
    return SensitivityTable(
        costs=costs,
        sizes=option_sizes(INDEX, BITS),
        bits=BITS,
        index=INDEX,
        method="jacobian",
        provenance={"policy": "p", "calibration": "c", "seed": 0},
        settings=QuantizerSettings(rounding="nearest"),
        statistics=InputStatistics(
            {layer.path: rng.normal(size=layer.fan_in) for layer in INDEX.layers},
            made_from={"calibration": "c"},
        ),
    )


def test_least_bits_by_pattern_on_the_command_line(table, tmp_path, capsys):
    table.save(tmp_path / files.SENSITIVITY)
    table.statistics.save(tmp_path / files.STATISTICS)
    arguments = ["allocate", "--out", str(tmp_path), "--budget-bits", "5", "--sweep", "7"]
    queries, gates = (np.char.endswith(PATHS, name) for name in (".q_proj", ".gate_proj"))

    assert cli.main(arguments) == 0
    free = Allocations.load(tmp_path / files.ALLOCATION).chosen
    assert free.bits[queries].min() < 8
    assert free.bits[gates].min() < 2

    assert cli.main([*arguments, "--minimum-bits", r".*q_proj", "8", r".*gate_proj", "2"]) == 0
    bound = Allocations.load(tmp_path / files.ALLOCATION).items
    assert {allocation.budget_bits for allocation in bound} >= {5.0, 7.0}
    for allocation in bound:
        assert allocation.bits[queries].min() >= 8
        assert allocation.bits[gates].min() >= 2

    capsys.readouterr()
    assert cli.main([*arguments, "--minimum-bits", "qproj", "8"]) == cli.BAD_INPUT
    assert "the pattern 'qproj' matches none of the 6 layers" in capsys.readouterr().err


def test_all_constraints_together(table):
    free = solve(table.problem(budget_bits=5.0))
    bitops = table.index.fan_in[:, None] * np.array(table.bits) * 16
    used = Resource("BitOps", bitops, 0).used_by(free.choice)
    problem = dataclasses.replace(
        table.problem(budget_bits=5.0, minimum_bits={r".*\.q_proj": 4}),
        multiples=np.array([1, 4, 4, 4, 1]),
        resources=(Resource("BitOps", bitops, int(0.95 * used)),),
    )
    pairs = [(f"blocks.{b}.gate_proj", f"blocks.{b}.up_proj") for b in (0, 1)]
    heads = [f"blocks.{b}.q_proj" for b in (0, 1)]
    labels = np.where(
        np.isin(PATHS, heads), row_blocks(problem, heads, 8), paired_rows(problem, pairs)
    )
    tied = tie(problem, labels)
    solution = solve(tied.problem, "ilp", time_limit=None, gap=1e-2)
    assert verify(tied.problem, solution).ok
    choice = tied.expand(solution.choice)
    assert problem.violation(choice) is None
    assert problem.cost_of(choice) > free.cost
    bits = table.bits_of(dataclasses.replace(solution, choice=choice))
    for layer, rows in table.index.items():
        counts = np.bincount(bits[rows], minlength=17)
        assert not (counts[[2, 4, 8]] % 4).any()
        if layer.path.endswith("q_proj"):
            assert bits[rows].min() >= 4
            assert (np.ptp(bits[rows].reshape(-1, 8), axis=1) == 0).all()
    for gate, up in pairs:
        np.testing.assert_array_equal(bits[gate == PATHS], bits[up == PATHS])


def test_two_budgets_are_met_at_the_least_cost(table):
    """Block 1 is read five times in a call; against an exact search."""
    times = np.array([5 if ".1." in path else 1 for path in INDEX.paths])
    often = dataclasses.replace(table, reads=tuple(times.tolist()))
    assert often.weights_read == 6 * 32 * 64 * 3
    one = allocate(often, budget_bits=5)
    both = allocate(often, budget_bits=5, budget_read=3.5)
    limit = 3.5 * often.weights_read / 8
    assert both.read_bytes <= limit < one.read_bytes
    assert both.stored_bytes <= both.budget_bytes
    assert both.bits[np.char.startswith(PATHS, "blocks.1.")].mean() < both.bits.mean()
    searched = solve(often.problem(budget_bits=5, budget_read=3.5), "ilp", time_limit=None)
    assert both.lower_bound <= searched.cost * (1 + 1e-9)
    assert both.predicted_sse_normalized <= searched.cost * 1.05
    # Where all weights are read equally often, both budgets are the same.
    same = allocate(table, budget_bits=5, budget_read=4)
    assert same.stored_bytes == same.read_bytes <= 4 * table.index.num_weights / 8
    assert read_front(table, (5.0,)) == ()
    with pytest.raises(BudgetError, match="bytes that a call reads cannot be met"):
        allocate(often, budget_bits=5, budget_read=0.1)


def test_no_point_of_the_front_is_better_than_another(table):
    times = tuple(5 if ".1." in path else 1 for path in INDEX.paths)
    often = dataclasses.replace(table, reads=times)
    front = read_front(often, (4.0, 6.0))
    for bits in (4.0, 6.0):
        line = [point for point in front if point.budget_bits == bits]
        error = allocate(often, budget_bits=bits).predicted_sse_normalized
        assert all(point.cost <= error * 1.1 for point in line)
        assert line[-1].read_bytes < line[0].read_bytes
        assert line[-1].stored_bytes > line[0].stored_bytes


def test_how_often_layers_are_read_is_kept(table, tmp_path):
    often = dataclasses.replace(table, reads=(1, 2, 3, 4, 5, 6))
    often.save(tmp_path / "table.safetensors")
    assert SensitivityTable.load(tmp_path / "table.safetensors").reads == (1, 2, 3, 4, 5, 6)
    with pytest.raises(InputError, match="reads: expected 6 numbers from 0"):
        dataclasses.replace(table, reads=(1,))


def test_a_budget_of_reads_is_an_option(table, tmp_path):
    often = dataclasses.replace(table, reads=(1, 1, 1, 5, 5, 5))
    often.save(tmp_path / files.SENSITIVITY)
    table.statistics.save(tmp_path / files.STATISTICS)
    arguments = ["allocate", "--out", str(tmp_path), "--budget-bits", "5", "--sweep", "7"]
    assert cli.main([*arguments, "--budget-read", "3.5"]) == 0
    found = Allocations.load(tmp_path / files.ALLOCATION)
    assert found.chosen.solver == "lagrangian"
    assert found.chosen.budget == "5,read3.5"
    assert found.at("7").budget_read is None
    assert {point.budget_bits for point in found.front} == {5.0, 7.0}
    assert cli.main([*arguments, "--budget-read", "0"]) == 2
