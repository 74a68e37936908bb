"""The table of results (`qvla study`) as Markdown, and its two Pareto figures."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qvla_jax.evaluation.paired import Success
from qvla_jax.evaluation.study import Cell, CellErrors, Study
from qvla_jax.report.png import new_figure, save_png
from qvla_jax.report.svg import number


def markdown(study: Study) -> str:
    """Tables of action error and, where it was measured, of success; rows are methods."""
    parts = [
        "### Action error\n\nSquared error of the normalized action on "
        f"{study.heldout['frames']} held-out frames against full precision, and in brackets "
        "the bits per weight that are really stored.\n",
        _table(study, _error),
        "\nThe median over these frames in place of the mean, of which a few frames hold much.\n",
        _table(study, _median),
    ]
    if (full := study.full_precision.success) is not None:
        parts += [
            f"\n### Success\n\n{study.sim}, full precision {_rate(full)}. Episodes solved, "
            "success with Wilson's 95 % interval, and in brackets the share of what full precision "
            "solves of the same episodes.\n",
            _table(study, _success),
        ]
    found = study.rank_correlation_with_success
    if found.spearman is not None:
        parts += [
            "\n### What predicts success\n\nSpearman's rank correlation with success over "
            f"{found.policies} policies; bytes should have it positive, errors negative.\n",
            "| measured offline | rank correlation |\n|---|---|",
            *(f"| {name} | {value:+.2f} |" for name, value in found.spearman.items()),
        ]
    return "\n".join(parts) + "\n"


def draw_error(study: Study, path: Path) -> None:
    """Draws action error (log) against stored bytes as PNG, one series per row.

    Cells with rounded activations are hollow; a line connects the best of the others.

    Args:
        study: what `pipeline.study` returns.
        path: the picture's file, which is replaced.
    """
    errors = [(*pair, _mse(pair[1])) for pair in _available(study)]
    points = [_Point(cell, e.stored_bytes, mse) for cell, e, mse in errors if mse > 0]
    _draw(study, points, path, label="action MSE (normalized)", log=True)


def draw_success(study: Study, path: Path) -> None:
    """Draws success with its interval against stored bytes as PNG; arguments of `draw_error`."""
    points = []
    for cell, errors in _available(study):
        if cell.closed_loop is not None:
            found = cell.closed_loop.success
            low, high = found.interval_95
            around = (found.rate - low, high - found.rate)
            points.append(_Point(cell, errors.stored_bytes, found.rate, around))
    full = study.full_precision.success
    _draw(study, points, path, label="success", line=None if full is None else full.rate)


@dataclasses.dataclass(frozen=True)
class _Point:
    """A cell in a figure."""

    cell: Cell
    stored_bytes: int
    value: float
    # Below and above the value.
    interval: tuple[float, float] = (0.0, 0.0)

    @property
    def mebibytes(self) -> float:
        return self.stored_bytes / 2**20

    @property
    def rounds_activations(self) -> bool:
        return self.cell.activation_bits < 16


def _draw(
    study: Study,
    points: Sequence[_Point],
    path: Path,
    *,
    label: str,
    log: bool = False,
    line: float | None = None,
) -> None:
    figure = new_figure(11, 6)
    axes = figure.subplots()
    for place, row in enumerate(study.rows):
        label_of_row: str | None = row
        for rounded in (False, True):
            own = [p for p in points if p.cell.row == row and p.rounds_activations == rounded]
            if own:
                axes.errorbar(
                    [p.mebibytes for p in own],
                    [p.value for p in own],
                    yerr=None if log else list(zip(*(p.interval for p in own), strict=True)),
                    marker="os^Dv*<>"[place % 8],
                    markersize=6,
                    markerfacecolor="none" if rounded else None,
                    linestyle="none",
                    elinewidth=1,
                    color=f"C{place % 10}",
                    label=label_of_row,
                )
                label_of_row = None
    axes.plot([], [], "ko", markerfacecolor="none", label="hollow: rounded activations")
    front = _front([p for p in points if not p.rounds_activations], lowest=log)
    axes.step(
        [x for x, _ in front], [y for _, y in front], where="post", color="gray", linewidth=1,
        linestyle=":", label="best of 16-bit activations",
    )  # fmt: skip
    if line is not None:
        axes.axhline(line, color="black", linewidth=1, label="full precision")
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("stored for the quantized layers (MiB)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    save_png(figure, path)


def _front(points: Sequence[_Point], *, lowest: bool) -> list[tuple[float, float]]:
    """MiB and value of the cells that are better than all cells of the same size or smaller."""
    front: list[tuple[float, float]] = []
    sign = 1 if lowest else -1
    for point in sorted(points, key=lambda p: (p.stored_bytes, sign * p.value)):
        if not front or sign * point.value < sign * front[-1][1]:
            front.append((point.mebibytes, point.value))
    return front


def _table(study: Study, text: Callable[[Cell, CellErrors], str]) -> str:
    columns = study.columns
    cells = {(cell.row, cell.column): (cell, errors) for cell, errors in _available(study)}
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in study.rows:
        found = [cells.get((row, column)) for column in columns]
        texts = ["-" if pair is None else text(*pair) for pair in found]
        lines.append(f"| `{row}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _available(study: Study) -> Iterator[tuple[Cell, CellErrors]]:
    for cell in study.cells:
        if cell.errors is not None:
            yield cell, cell.errors


def _mse(errors: CellErrors) -> float:
    return errors.versus_full_precision.action_mse_normalized


def _error(_: Cell, errors: CellErrors) -> str:
    return f"{number(_mse(errors))} ({errors.stored_bits_per_weight:.2f})"


def _median(_: Cell, errors: CellErrors) -> str:
    return number(errors.versus_full_precision.action_mse_median_normalized)


def _rate(success: Success) -> str:
    low, high = success.interval_95
    counts = f"{success.successes} of {success.episodes}"
    return f"{counts}, {success.rate:.1%} [{low:.1%}, {high:.1%}]"


def _success(cell: Cell, _: CellErrors) -> str:
    if cell.closed_loop is None:
        return "-"
    share = cell.closed_loop.share_of_full_precision
    return _rate(cell.closed_loop.success) + ("" if share is None else f" ({share:.1%})")
