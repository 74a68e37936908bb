"""Figures as PNG files, through matplotlib's Agg canvas alone.

`pyplot` is never imported: it chooses a backend for the whole process and keeps every figure.
"""

import os
from typing import TYPE_CHECKING

from qvla_jax.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure.

    Args:
        width: in inches.
        height: in inches.
    """
    # Imported late: most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure, completely or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH, format="png")
