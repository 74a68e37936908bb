"""Constraints on a table of sensitivities: on the command line, and all together in Python."""

import dataclasses

import numpy as np
import pytest

from qvla_jax import cli
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
