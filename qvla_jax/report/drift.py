"""The figure of closed-loop drift, as a PNG file."""

import os
from collections.abc import Mapping

from qvla_jax.evaluation.drift import Drift
from qvla_jax.report.png import new_figure, save_png


def save_drift(drifts: Mapping[str, Drift], path: str | os.PathLike[str]) -> None:
    """Draws the end effectors' distance and the accumulated action deviation over time.

    Args:
        drifts: name of a policy -> its drift from the reference.
        path: the file; its name ends in `.png`.
    """
    figure = new_figure(11, 4.2)
    distance, deviation = figure.subplots(1, 2)
    for number, (name, drift) in enumerate(drifts.items()):
        color = f"C{number % 10}"
        seconds = drift.seconds
        median = [100 * value for value in drift.distance_median]
        upper = [100 * value for value in drift.distance_upper]
        distance.plot(seconds, median, color=color, label=name)
        distance.fill_between(seconds, median, upper, color=color, alpha=0.12, linewidth=0)
        means = drift.deviation_mean
        if means:
            step = seconds[1] if len(seconds) > 1 else 1.0
            deviation.plot([step * k for k in range(len(means))], means, color=color, label=name)
    distance.set_title("drift: median and 90th percentile")
    distance.set_ylabel("end effectors' distance (cm)")
    deviation.set_title("accumulated along the reference's rollouts")
    deviation.set_ylabel("squared normalized action deviation")
    deviation.set_yscale("log")
    for axes in (distance, deviation):
        axes.set_xlabel("time (s)")
        axes.grid(alpha=0.3)
    distance.legend()
    save_png(figure, path)
