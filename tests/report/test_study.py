"""The Pareto figures of the table of results."""

import matplotlib.axes
import numpy as np
import pytest

from qvla_jax.report.study import draw_error, draw_success

MIB = 2**20


def _cell(row, mib, bits, error, rate):
    return {
        "row": row,
        "stored_bytes": mib * MIB,
        "activation_bits": bits,
        "versus_full_precision": {"action_mse_normalized": error},
        "success": {"rate": rate, "interval_95": (rate - 0.05, rate + 0.05)},
    }


CELLS = [
    _cell("ours", 1, 16, 0.02, 0.8),
    _cell("rtn", 1, 16, 0.04, 0.9),
    _cell("ours", 2, 16, 0.03, 0.85),
    _cell("ours", 3, 16, 0.01, 0.95),
    _cell("ours", 2, 4, 0.001, 1.0),
    {"row": "rtn", "unavailable": "no such budget"},
]
RESULTS = {
    "rows": ["rtn", "ours"],
    "cells": CELLS,
    "full_precision": {"success": {"rate": 0.97}},
}


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
