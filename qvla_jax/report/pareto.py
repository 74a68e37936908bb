"""The Pareto figure of a comparison of solvers, as a PNG file."""

import os

import numpy as np

from qvla_jax.report.png import new_figure, save_png
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
    unit, name = (weights / 8, "bits per weight") if weights else (2**20, "MiB")
    figure = new_figure(8, 5)
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
    save_png(figure, path)
