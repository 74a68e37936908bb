"""The table of results (`qvla study`) as Markdown, and its two Pareto figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvla_jax.report.png import new_figure, save_png
from qvla_jax.report.svg import number


def markdown(study: Mapping[str, Any]) -> str:
    """Tables of action error and, where it was measured, of success; rows are methods."""
    parts = [
        "### Action error\n\nSquared error of the normalized action on "
        f"{study['heldout']['frames']} held-out frames against full precision, and in brackets "
        "the bits per weight that are really stored.\n",
        _table(study, _error),
        "\nThe median over these frames in place of the mean, of which a few frames hold much.\n",
        _table(study, _median),
    ]
    if (full := study["full_precision"]["success"]) is not None:
        parts += [
            f"\n### Success\n\n{study['sim']}, full precision {_rate(full)}. Episodes solved, "
            "success with Wilson's 95 % interval, and in brackets the share of what full precision "
            "solves of the same episodes.\n",
            _table(study, _success),
        ]
    if found := study["rank_correlation_with_success"]:
        parts += [
            "\n### What predicts success\n\nSpearman's rank correlation with success over "
            f"{found['policies']} policies; bytes should have it positive, errors negative.\n",
            "| measured offline | rank correlation |\n|---|---|",
            *(f"| {name} | {value:+.2f} |" for name, value in found["spearman"].items()),
        ]
    return "\n".join(parts) + "\n"


def draw_error(study: Mapping[str, Any], path: Path) -> None:
    """Draws action error (log) against stored bytes as PNG, one series per row.

    Cells with rounded activations are hollow; a line connects the best of the others.

    Args:
        study: what `pipeline.study` returns.
        path: the picture's file, which is replaced.
    """
    errors = [(cell, _mse(cell)) for cell in _available(study)]
    points = [(cell, error, (0.0, 0.0)) for cell, error in errors if error > 0]
    _draw(study, points, path, label="action MSE (normalized)", log=True)


def draw_success(study: Mapping[str, Any], path: Path) -> None:
    """Draws success with its interval against stored bytes as PNG; arguments of `draw_error`."""
    points = []
    for cell in _available(study):
        if "success" in cell:
            rate, (low, high) = cell["success"]["rate"], cell["success"]["interval_95"]
            points.append((cell, rate, (rate - low, high - rate)))
    full = study["full_precision"]["success"]
    _draw(study, points, path, label="success", line=None if full is None else full["rate"])


def _draw(
    study: Mapping[str, Any],
    points: Sequence[tuple[Mapping[str, Any], float, tuple[float, float]]],
    path: Path,
    *,
    label: str,
    log: bool = False,
    line: float | None = None,
) -> None:
    figure = new_figure(11, 6)
    axes = figure.subplots()
    for place, row in enumerate(study["rows"]):
        label_of_row: str | None = row
        for rounded in (False, True):
            own = [
                (cell["stored_bytes"] / 2**20, y, interval)
                for cell, y, interval in points
                if cell["row"] == row and (cell["activation_bits"] < 16) == rounded
            ]
            if own:
                axes.errorbar(
                    [x for x, _, _ in own],
                    [y for _, y, _ in own],
                    yerr=None if log else [[e[0] for *_, e in own], [e[1] for *_, e in own]],
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
    weights_only = [(c, y) for c, y, _ in points if c["activation_bits"] == 16]
    front = _front(weights_only, lowest=log)
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


def _front(
    points: Sequence[tuple[Mapping[str, Any], float]], *, lowest: bool
) -> list[tuple[float, float]]:
    """MiB and value of the cells that are better than all cells of the same size or smaller."""
    front: list[tuple[float, float]] = []
    for cell, value in sorted(
        points, key=lambda p: (p[0]["stored_bytes"], p[1] if lowest else -p[1])
    ):
        if not front or (value < front[-1][1] if lowest else value > front[-1][1]):
            front.append((cell["stored_bytes"] / 2**20, value))
    return front


def _table(study: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str]) -> str:
    columns = study["columns"]
    cells = {(cell["row"], cell["column"]): cell for cell in study["cells"]}
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in study["rows"]:
        found = [cells.get((row, column)) for column in columns]
        texts = ["-" if c is None or "unavailable" in c else text(c) for c in found]
        lines.append(f"| `{row}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _available(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in study["cells"] if "unavailable" not in cell]


def _mse(cell: Mapping[str, Any]) -> float:
    return cell["versus_full_precision"]["action_mse_normalized"]


def _error(cell: Mapping[str, Any]) -> str:
    return f"{number(_mse(cell))} ({cell['stored_bits_per_weight']:.2f})"


def _median(cell: Mapping[str, Any]) -> str:
    return number(cell["versus_full_precision"]["action_mse_median_normalized"])


def _rate(success: Mapping[str, Any]) -> str:
    low, high = success["interval_95"]
    counts = f"{success['successes']} of {success['episodes']}"
    return f"{counts}, {success['rate']:.1%} [{low:.1%}, {high:.1%}]"


def _success(cell: Mapping[str, Any]) -> str:
    if "success" not in cell:
        return "-"
    share = cell["share_of_full_precision"]
    return _rate(cell["success"]) + ("" if share is None else f" ({share:.1%})")
