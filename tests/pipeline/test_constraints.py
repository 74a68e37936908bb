"""Constraints on a measured table: by pattern on the command line, and all together in Python."""

import dataclasses
import shutil

import numpy as np
import pytest

from qvla_jax import cli
from qvla_jax.inference import load_policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.quantization import quantize
from qvla_jax.solvers import Resource, paired_rows, solve, tie, verify


@pytest.fixture(scope="module")
def table(config, content):
    return load_tables(config.out)[0]


def test_least_bits_by_pattern_on_the_command_line(config, content, table, tmp_path, capsys):
    for name in (files.SENSITIVITY, files.STATISTICS):
        shutil.copy(config.out / name, tmp_path)
    arguments = ["allocate", "--out", str(tmp_path), "--budget-bits", "10", "--sweep", "12"]
    least = ["--minimum-bits", r".*\.q_proj", "8", r".*\.down_proj", "4"]
    assert cli.main([*arguments, *least]) == 0
    paths = np.array(table.index.paths)[table.index.layer_of]
    for allocation in Allocations.load(tmp_path / files.ALLOCATION).items:
        assert allocation.bits[np.char.endswith(paths, ".q_proj")].min() >= 8
        assert allocation.bits[np.char.endswith(paths, ".down_proj")].min() >= 4
    free = Allocations.load(config.out / files.ALLOCATION).chosen
    assert free.bits[np.char.endswith(paths, ".q_proj")].min() < 8  # it bound
    capsys.readouterr()
    assert cli.main([*arguments, "--minimum-bits", "qproj", "8"]) == cli.BAD_INPUT
    assert "the pattern 'qproj' matches none of the" in capsys.readouterr().err


def test_all_constraints_together_on_a_measured_table(config, table):
    free = solve(table.problem(budget_bits=9.0))
    bitops = table.index.fan_in[:, None] * np.array(table.bits) * 16
    limit = int(0.95 * Resource("BitOps", bitops, 0).used_by(free.choice))
    problem = dataclasses.replace(
        table.problem(budget_bits=9.0, minimum_bits={r".*\.q_proj": 4}),
        multiples=np.array([1, 4, 4, 4, 1]),
        resources=(Resource("BitOps", bitops, limit),),
    )
    gates = [path for path in table.index.paths if path.endswith("gate_proj")]
    pairs = [(gate, gate.replace("gate_proj", "up_proj")) for gate in gates]
    labels = paired_rows(problem, pairs)
    tied = tie(problem, labels)
    solution = solve(tied.problem, "ilp", time_limit=5.0, gap=1e-2)
    assert verify(tied.problem, solution).ok
    choice = tied.expand(solution.choice)
    assert problem.violation(choice) is None
    assert problem.cost_of(choice) >= free.lower_bound
    _, first = np.unique(labels, return_index=True)
    np.testing.assert_array_equal(choice, choice[first][tied.member])
    bits = table.bits_of(dataclasses.replace(solution, choice=choice))
    for layer, rows in table.index.items():
        counts = np.bincount(bits[rows], minlength=17)
        assert not (counts[[2, 4, 8]] % 4).any()
        assert bits[rows].min() >= (4 if layer.path.endswith(".q_proj") else 0)
    policy = quantize(load_policy(config.model), bits)
    assert policy is not None
