"""The validation of a small run: what it writes, and that its figures are what they say."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from qvla_jax import pipeline
from qvla_jax.allocation import allocate
from qvla_jax.data.calibration import calibration_set
from qvla_jax.errors import InputError
from qvla_jax.evaluation.validation import Validation
from qvla_jax.inference import load_policy
from qvla_jax.inference.quantize import quantize
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import load_tables
from qvla_jax.plain import to_plain
from qvla_jax.report.validation import validation_tables
from qvla_jax.sensitivity import sensitivities, spearman


@pytest.fixture(scope="module")
def settings(config):
    return pipeline.ValidateConfig(
        model=config.model, out=config.out, channels=24, frames=6, eval_frames=5,
        estimators=("input_hessian",), budgets=(9.0, 12.0), sizes=(6,), seeds=(0, 1),
        trajectories=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(content, settings):
    return pipeline.validate(settings)


@pytest.fixture(scope="module")
def validation(found, settings):
    return json.loads((settings.out / files.VALIDATION).read_text())


def test_the_file_and_the_picture_are_there(found, validation, settings):
    assert validation == to_plain(found)
    assert files.read_result(settings.out / files.VALIDATION, Validation) == found
    with Image.open(settings.out / files.VALIDATION_FIGURE) as picture:
        assert picture.format == "PNG"
    assert all(table.row_count for table in validation_tables(found))


def test_every_method_is_compared_at_every_bit_width(validation):
    assert list(validation["ranks"]["methods"]) == ["jacobian", "input_hessian"]
    for rows in validation["ranks"]["methods"].values():
        assert [row["bits"] for row in rows] == [0, 2, 4, 8]
        assert all(-1 <= row["spearman"] <= 1 and 0 <= row["top"] <= 1 for row in rows)


def test_the_measured_joint_error_is_that_of_the_quantized_policy(validation, settings):
    policy, table = load_policy(settings.model), load_tables(settings.out)[0]
    heldout = calibration_set("bundled", frames=5, seed=0, split="heldout", horizon=8)
    for row in validation["additivity"]:
        allocation = allocate(table, budget_bits=row["budget_bits"])
        (batch,) = heldout.batches(5)
        quantized = quantize(policy, allocation, packed=False)
        change = quantized.infer_normalized(batch) - policy.infer_normalized(batch)
        measured = np.mean(np.sum(change.astype(np.float64) ** 2, axis=(1, 2)))
        assert row["measured_heldout"] == pytest.approx(measured, rel=1e-3)
        assert row["summed"] <= row["predicted"]


def test_the_run_s_own_calibration_set_has_no_regret(validation):
    """Six frames of seed 0 are the run's own set; any other can only choose worse."""
    own = next(row for row in validation["stability"] if (row["frames"], row["seed"]) == (6, 0))
    assert all(rho == pytest.approx(1.0, abs=1e-6) for rho in own["spearman"].values())
    for row in validation["stability"]:
        # The allocation is greedy, so that another's may be better by the last channel.
        assert all(value > -0.01 for value in row["regret"].values())


def test_cumulative_ranks_are_those_of_the_trajectories_frames(validation, settings):
    """A sum over all frames of some trajectories orders channels as their mean does."""
    found = validation["cumulative"]
    drawn = calibration_set("bundled", trajectories=2, stride=8, seed=0)
    assert found["trajectories"] == len(set(drawn.manifest["episodes"])) == 2
    assert found["frames"] == drawn.frames
    policy, table = load_policy(settings.model), load_tables(settings.out)[0]
    whole = sensitivities(
        policy, drawn, probes=2, quantizer=table.settings, statistics=table.statistics, joint=False
    )
    for column, bits in enumerate(("0", "2", "4", "8")):
        reached = table.costs.any(axis=1)
        expected = spearman(whole.costs[reached, column], table.costs[reached, column])
        assert found["spearman"][bits] == pytest.approx(expected, abs=1e-4)
        least, median, largest = found["single"][bits]
        assert -1 <= least <= median <= largest <= 1
        assert 0 <= found["top"][bits] <= 1


def test_kept_modules_are_measured_too(validation):
    kept = {row["module"] for row in validation["modules"] if row["kept"]}
    assert any(module.startswith("projector") for module in kept)
    assert any(module.startswith("action_head") for module in kept)
    # No action of an L1 head reads the language model's own head.
    assert not any("lm_head" in row["module"] for row in validation["modules"])


def test_a_table_of_another_policy_is_refused(content, settings):
    with pytest.raises(InputError, match="made for another policy fingerprint"):
        pipeline.validate(dataclasses.replace(settings, model="libero-mini"))
