"""The Pareto figure of a comparison of solvers, as a PNG file."""

import importlib
import os
from typing import Any

import numpy as np

from qvla_jax.atomic import atomic_path
from qvla_jax.solvers import Pareto


def save_pareto(
    pareto: Pareto, path: str | os.PathLike[str], *, weights: int | None = None
) -> None:
    """Draws cost (log) against bytes, one series per solver above the line of the bound.

    Args:
        pareto: the points.
        path: the file; its name ends in `.png`.
        weights: quantized weights, to label the horizontal axis in bits per weight.
    """
    # Without pyplot: no display, no global state.
    figure_module: Any = importlib.import_module("matplotlib.figure")
    unit, name = (weights / 8, "bits per weight") if weights else (2**20, "MiB")
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shown = pareto.lower_bound > 0
    axes.plot(
        pareto.budgets[shown] / unit, pareto.lower_bound[shown], color="black", label="lower bound"
    )
    for number, (solver, cost) in enumerate(pareto.cost.items()):
        drawn = np.greater(cost, 0)
        axes.plot(
            pareto.size[solver][drawn] / unit,
            cost[drawn],
            marker="os^Dvx+*"[number % 8],
            markersize=5,
            linestyle="none",
            label=solver,
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"stored ({name})")
    axes.set_ylabel("summed cost")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
