"""Figures as PNG files: each kind is drawn without touching matplotlib's state of the process."""

import sys

import matplotlib
import numpy as np
import pytest

from qvla_jax.evaluation import validation as results
from qvla_jax.report.drift import save_drift
from qvla_jax.report.pareto import save_pareto
from qvla_jax.report.study import draw_error, draw_success
from qvla_jax.report.validation import draw, validation_tables
from qvla_jax.sensitivity.validation import RankCorrelation
from qvla_jax.solvers import AllocationProblem, pareto

from .test_study import RESULTS

BITS = ("0", "4")
VALIDATION = results.Validation(
    made_from={},
    model_options={},
    method="jacobian",
    bits=(0, 4, 16),
    ranks=results.Ranks(
        channels=24,
        frames=3,
        methods={
            "jacobian": tuple(
                RankCorrelation(bits=int(b), spearman=0.9, top=0.5, by_module={}) for b in BITS
            )
        },
    ),
    additivity=(
        results.Additivity(
            budget_bits=4.0,
            pruned=0.1,
            summed=0.2,
            predicted=0.3,
            measured_calibration=0.25,
            measured_heldout=0.4,
        ),
    ),
    stability=tuple(
        results.Stability(
            frames=frames, seed=0, spearman=dict.fromkeys(BITS, 0.8), regret={"4": 0.01}
        )
        for frames in (4, 8)
    ),
    cumulative=results.Cumulative(
        trajectories=2,
        frames=10,
        stride=8,
        spearman=dict.fromkeys(BITS, 0.7),
        top=dict.fromkeys(BITS, 0.6),
        single=dict.fromkeys(BITS, (0.5, 0.6, 0.7)),
    ),
    modules=(
        results.ModuleCosts(
            module="projector",
            kept=True,
            channels=8,
            weights=64,
            cost_of_channel=dict.fromkeys(BITS, 0.1),
            cost_of_thousand_weights=dict.fromkeys(BITS, 0.2),
        ),
    ),
    provenance={},
)


@pytest.fixture(scope="module")
def points():
    costs = np.array([[4.0, 1.0, 0.0], [2.0, 0.5, 0.0], [9.0, 3.0, 0.0]])
    sizes = np.tile([0, 4, 8], (3, 1))
    return pareto(AllocationProblem(costs=costs, sizes=sizes, budget=12), budgets=3)


def test_no_figure_changes_the_backend_or_imports_pyplot(
    points, closed_loop_summary, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    drift = closed_loop_summary.comparisons[0].drift
    with matplotlib.rc_context({"backend": "svg"}):
        draw(VALIDATION, tmp_path / "validation.png")
        draw_error(RESULTS, tmp_path / "error.png")
        draw_success(RESULTS, tmp_path / "success.png")
        save_drift({"four bits": drift}, tmp_path / "drift.png")
        save_pareto(points, tmp_path / "pareto.png", weights=24)
        assert matplotlib.rcParams["backend"] == "svg"
    assert "matplotlib.pyplot" not in sys.modules
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_validation_has_a_table_for_each_of_its_parts():
    titles = [str(table.columns[0].header) for table in validation_tables(VALIDATION)]
    assert len(titles) == 5
    assert titles[3] == "along 2 trajectories"
