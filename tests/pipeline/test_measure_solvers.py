"""Measured objectives: against `quantize`, finite differences, and single moves really made."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from qvla_jax import cli, pipeline
from qvla_jax.errors import InputError
from qvla_jax.evaluation import action_errors, predict
from qvla_jax.evaluation.objective import ActionErrorObjective
from qvla_jax.evaluation.sequential import allocate_sequentially, gradient_costs, move_costs
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.quantize import quantize
from qvla_jax.pipeline.allocate import load_tables
from qvla_jax.pipeline.measure_solvers import FILE, MeasureSolversConfig
from qvla_jax.solvers import solve


@pytest.fixture(scope="module")
def policy(policy_folder):
    return load_policy(policy_folder)


@pytest.fixture(scope="module")
def table(config, content):
    return load_tables(config.out)[0]


@pytest.fixture(scope="module")
def frames(config, content):
    return pipeline.load_calibration(config.out)


@pytest.fixture(scope="module")
def objective(policy, frames, table):
    return ActionErrorObjective(policy, frames, table, batch=4)  # 6 frames: the second is padded


@pytest.fixture(scope="module")
def start(table):
    return solve(table.problem(budget_bits=9.0)).choice


def test_a_select_is_what_quantize_makes(policy, frames, table, objective, start):
    rng = np.random.default_rng(0)
    other = rng.integers(0, len(table.bits), len(start))
    untouched = np.full(len(start), table.bits.index(16))
    errors = objective(np.stack([start, other, untouched]))
    reference = predict(policy, frames, batch_size=6).chunks
    for choice, error in zip((start, other), errors, strict=False):
        solution = dataclasses.replace(solve(table.problem(budget_bits=9.0)), choice=choice)
        bits = table.bits_of(solution)
        changed = quantize(policy, bits, quantizer=table.quantizer, packed=False)
        chunks = predict(changed, frames, batch_size=6).chunks
        expected = action_errors(chunks, reference).action_sse_normalized
        assert error == pytest.approx(expected, rel=1e-3)
    assert errors[2] == 0
    assert objective.frames == 6
    # A candidate's error does not hang on the others of its call; side by side is the same.
    np.testing.assert_array_equal(objective(other[None]), errors[1:2])
    side_by_side = ActionErrorObjective(policy, frames, table, batch=4, at_once=2)
    beside = side_by_side(np.stack([start, other, untouched]))
    np.testing.assert_allclose(beside[:2], errors[:2], rtol=1e-3)
    assert beside[2] == 0


def test_the_gradient_is_that_of_the_measured_error(objective, start):
    gradient, here = objective.gradient(start), objective.select(start)
    rng = np.random.default_rng(1)
    path = max(gradient, key=lambda p: float(np.abs(np.asarray(gradient[p]["kernel"])).max()))
    for name in ("kernel", "bias"):
        slope = np.asarray(gradient[path][name], np.float64)
        direction = np.sign(slope) * rng.random(slope.shape)

        def error(step: float, name=name, direction=direction) -> float:
            moved = here[path][name] + (step * direction).astype(np.float32)
            arrays = {**here, path: {**here[path], name: moved}}
            change = objective._chunks([arrays])[0].astype(np.float64) - objective.reference
            return float(np.mean(np.sum(change**2, axis=(1, 2))))

        # A change of about 2 % each way: beyond rounding, and still straight.
        step = 0.02 * error(0.0) / float((slope * direction).sum())
        difference = (error(step) - error(-step)) / (2 * step)
        assert (slope * direction).sum() == pytest.approx(difference, rel=0.05)


@pytest.mark.long
def test_costs_of_moves_predict_single_moves(frames, objective, table, start):
    index = np.arange(len(start))
    linear = gradient_costs(objective, start)
    square = move_costs(objective, frames, start, probes="full")
    assert not linear[index, start].any()
    assert not square[index, start].any()
    assert (square >= 0).all()
    # The largest moves to other grids; pruning is too large for a first order.
    predicted = linear + square
    predicted[:, 0] = 0
    largest = np.argsort(-np.abs(predicted), axis=None)[:24]
    channels, options = np.unravel_index(largest, predicted.shape)
    before = objective(start[None])[0]
    measured = []
    for channel, option in zip(channels, options, strict=True):
        moved = start.copy()
        moved[channel] = option
        measured.append(objective(moved[None])[0] - before)
    expected = predicted[channels, options]
    assert scipy.stats.spearmanr(expected, measured).statistic > 0.95
    assert np.median(np.abs(measured - expected) / np.abs(expected)) < 0.15


def test_sequential_allocation_lowers_the_measured_error(frames, objective, table, start):
    problem = table.problem(budget_bits=9.0)
    poor = solve(table.problem(budget_bits=7.0)).choice
    found = allocate_sequentially(objective, frames, problem, start=poor, rounds=2, probes="full")
    assert found.start_error == pytest.approx(objective(poor[None])[0])
    assert found.error == pytest.approx(objective(found.choice[None])[0])
    assert found.error < found.start_error
    assert problem.violation(found.choice) is None
    kept = allocate_sequentially(objective, frames, problem, rounds=0)
    np.testing.assert_array_equal(kept.choice, start)
    with pytest.raises(InputError, match="rounds >= 0"):
        allocate_sequentially(objective, frames, problem, rounds=-1)


def test_sequential_allocation_is_never_worse_than_its_start(objective, frames, table):
    start = solve(table.problem(budget_bits=7.0)).choice

    class OnlyTheStartIsGood(ActionErrorObjective):
        def __call__(self, choices):
            return np.where((np.atleast_2d(choices) == start).all(axis=1), 1.0, 2.0)

    objective = copy.copy(objective)
    objective.__class__ = OnlyTheStartIsGood
    problem = table.problem(budget_bits=9.0)
    found = allocate_sequentially(objective, frames, problem, start=start, rounds=2, probes="full")
    np.testing.assert_array_equal(found.choice, start)
    assert found.error == found.start_error == 1.0
    assert found.evaluations > 1


def test_the_command_measures_every_allocation(config, content, policy_folder, capsys):
    arguments = (
        "measure-solvers", "--model", policy_folder, "--out", config.out, "--budgets", "9",
        "--solvers", "greedy:marginal", "greedy:qvla", "--rounds", "1", "--population", "4",
        "--turns", "1", "--eval-frames", "5", "--eval-batch", "4",
    )  # fmt: skip
    assert cli.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    records = json.loads((config.out / FILE).read_text())["allocations"]
    names = ["greedy:marginal", "greedy:qvla", "evolutionary", "local_search", "sequential"]
    assert [record["solver"] for record in records] == names
    assert all(name in printed for name in names)
    first = records[0]
    assert first["heldout_change"] == first["channels_changed"] == 0
    for record in records[2:]:
        assert record["calibration_sse_normalized"] <= first["calibration_sse_normalized"]
        assert record["stored_bytes"] <= first["budget_bytes"]
        change = record["heldout_sse_normalized"] - first["heldout_sse_normalized"]
        assert record["heldout_change"] == pytest.approx(change)


def test_what_does_not_belong_together_is_refused(config, content, frames, table, tmp_path):
    other = random_policy("tiny-test", seed=1)
    with pytest.raises(InputError, match="another policy"):
        ActionErrorObjective(other, frames, table)
    with pytest.raises(InputError, match="searches out of evolutionary"):
        MeasureSolversConfig(out=tmp_path, searches=("annealing",))
    settings = MeasureSolversConfig(
        out=config.out, model=config.model, eval_split="calibration", budgets=(9.0,)
    )
    with pytest.raises(InputError, match="calibrated on"):
        pipeline.measure_solvers(settings)
