"""The Pareto figures of the table of results."""

import matplotlib.axes
import numpy as np
import pytest

from qvla_jax.evaluation import ActionErrors, Comparison
from qvla_jax.evaluation.study import (
    Cell,
    CellErrors,
    CellSuccess,
    FullPrecision,
    Study,
    StudyPolicy,
    SuccessRanks,
)
from qvla_jax.evaluation.success import EpisodesSuccess
from qvla_jax.report.study import draw_error, draw_success, markdown

MIB = 2**20


def _cell(row, mib, bits, error, solved):
    errors = ActionErrors(
        action_sse_normalized=error,
        action_mse_normalized=error,
        action_mse_median_normalized=error,
        action_l1_normalized=error,
        mse_by_dimension=(error,),
        l1_by_dimension=(error,),
        worst_by_dimension=(error,),
        gripper_flips=0,
        gripper_flip_rate=0.0,
        frames=1,
    )
    return Cell(
        row=row,
        column=f"w{mib}a{bits}",
        activation_bits=bits,
        method=row,
        title=row,
        errors=CellErrors(
            stored_bytes=mib * MIB, stored_bits_per_weight=mib, versus_full_precision=errors
        ),
        closed_loop=CellSuccess(
            success=EpisodesSuccess(solved, 100, mean_steps_of_successes=90.0),
            share_of_full_precision=solved / 97,
            paired=Comparison(solved, 0, 97 - solved, 3),
        ),
    )


RESULTS = Study(
    made_from={},
    model=StudyPolicy(name="tiny", options={}, quantized_weights=8),
    heldout={"frames": 6},
    sim="libero_spatial",
    full_precision=FullPrecision(
        stored_bytes=16 * MIB, success=EpisodesSuccess(97, 100, mean_steps_of_successes=80.0)
    ),
    rows=("rtn", "ours"),
    columns=("w1a16", "w2a16", "w3a16", "w2a4", "w9a16"),
    cells=(
        _cell("ours", 1, 16, 0.02, 80),
        _cell("rtn", 1, 16, 0.04, 90),
        _cell("ours", 2, 16, 0.03, 85),
        _cell("ours", 3, 16, 0.01, 95),
        _cell("ours", 2, 4, 0.001, 97),
        Cell(
            row="rtn",
            column="w9a16",
            activation_bits=16,
            method="rtn-w9",
            title="rtn",
            unavailable="no such budget",
        ),
    ),
    rank_correlation_with_success=SuccessRanks(
        policies=5, spearman={"mean squared error of the action": -0.5}
    ),
    provenance={},
)


def test_the_tables_show_error_success_and_what_predicts_it():
    text = markdown(RESULTS)
    assert "| `rtn` | 0.04 (1.00) | - | - | - | - |" in text
    assert "| 90 of 100, 90.0% [82.6%, 94.5%] (92.8%) |" in text
    assert "| mean squared error of the action | -0.50 |" in text


@pytest.mark.parametrize(
    ("draw", "expected"),
    [(draw_error, [(1, 0.02), (3, 0.01)]), (draw_success, [(1, 0.9), (3, 0.95)])],
)
def test_the_line_joins_the_best_cells_without_rounded_activations(
    draw, expected, tmp_path, monkeypatch
):
    lines = []
    step = matplotlib.axes.Axes.step

    def record(axes, x, y, **options):
        lines.append(list(zip(x, y, strict=True)))
        return step(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "step", record)
    path = tmp_path / "figure.png"
    draw(RESULTS, path)
    np.testing.assert_allclose(lines, [expected])
    assert path.read_bytes().startswith(b"\x89PNG")
