"""`qvla validate` as tables and one picture: ranks, additivity, stability, modules."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from qvla_jax.evaluation.validation import (
    Additivity,
    Cumulative,
    ModuleCosts,
    Ranks,
    Stability,
    Validation,
)
from qvla_jax.report.png import new_figure, save_png
from qvla_jax.report.svg import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(validation: Validation, path: Path) -> None:
    """Draws a validation as PNG.

    Args:
        validation: what `pipeline.validate` returns.
        path: the picture's file, which is replaced.
    """
    figure = new_figure(12, 13)
    panels = figure.subplots(3, 2)
    _ranks(panels[0][0], validation.ranks)
    _additivity(panels[0][1], validation.additivity)
    _stable_ranks(panels[1][0], validation.stability)
    _stability(panels[1][1], validation.stability)
    _cumulative(panels[2][0], validation.cumulative)
    _modules(panels[2][1], validation.modules)
    save_png(figure, path)


def validation_tables(validation: Validation) -> list[Table]:
    """The same as tables for a terminal."""
    bits = [str(b) for b in validation.bits if b != 16]
    ranks = _table("Spearman with exact (overlap of the top tenth)", [f"{b} bits" for b in bits])
    for method, rows in validation.ranks.methods.items():
        ranks.add_row(method, *(f"{row.spearman:.4f} ({row.top:.2f})" for row in rows))
    additivity = _table(
        "budget", ["pruned", "sum", "with factors", "measured", "held out", "measured / predicted"]
    )
    for row in validation.additivity:
        additivity.add_row(
            f"{row.budget_bits:g} bits",
            f"{row.pruned:.1%}",
            number(row.summed),
            number(row.predicted),
            number(row.measured_calibration),
            number(row.measured_heldout),
            number(row.measured_calibration / row.predicted) if row.predicted else "-",
        )
    compared = [(f"{row.frames} frames, seed {row.seed}", row) for row in validation.stability]
    compared += [(f"same frames, noise {row.seed}", row) for row in validation.noise]
    budgets = list(compared[0][1].regret) if compared else []
    stability = _table(
        "other calibration set",
        [*(f"Spearman, {b} bits" for b in bits), *(f"regret, {b} bits" for b in budgets)],
    )
    for label, row in compared:
        stability.add_row(
            label,
            *(f"{row.spearman[b]:.3f}" for b in bits),
            *(f"{row.regret[b]:.1%}" for b in budgets),
        )
    tables = [ranks, additivity, stability]
    if (cumulative := validation.cumulative) is not None:
        table = _table(f"along {cumulative.trajectories} trajectories", [f"{b} bits" for b in bits])
        for label, values in (
            ("Spearman with single steps", cumulative.spearman),
            ("top tenth shared", cumulative.top),
        ):
            table.add_row(label, *(f"{values[b]:.3f}" for b in bits))
        table.add_row(
            "Spearman of one trajectory",
            *("{:.3f} to {:.3f}".format(*cumulative.single[b][::2]) for b in bits),
        )
        tables.append(table)
    modules = _table("squared error for 1,000 weights", ["channels", *(f"{b} bits" for b in bits)])
    for row in sorted(validation.modules, key=lambda row: -row.cost_of_thousand_weights["4"]):
        modules.add_row(
            row.module + (" (kept)" if row.kept else ""),
            f"{row.channels:,}",
            *(number(row.cost_of_thousand_weights[b]) for b in bits),
        )
    for embedding in validation.embeddings:
        title = (
            f"{embedding.module}: {len(embedding.tokens)} rows in prompts, "
            f"{embedding.unmeasured_rows:,} others not measured"
        )
        table = _table(title, [f"{b} bits" for b in embedding.summed])
        table.add_row("sum of single rows", *map(number, embedding.summed.values()))
        table.add_row("all rows, measured", *map(number, embedding.measured.values()))
        tables.append(table)
    return [*tables, modules]


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title, box=None, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ranks(panel: "Axes", ranks: Ranks) -> None:
    for method, rows in ranks.methods.items():
        panel.plot(
            [f"{row.bits} bits" for row in rows],
            [row.spearman for row in rows],
            marker="o",
            label=method,
        )
    panel.set(
        title=f"Rank correlation with exact probing\n{ranks.channels} channels, "
        f"{ranks.frames} frames",
        ylabel="Spearman",
    )
    panel.legend()


def _additivity(panel: "Axes", rows: Sequence[Additivity]) -> None:
    budgets = [row.budget_bits for row in rows]
    for values, label, style in (
        ([row.summed for row in rows], "sum of single errors", "o:"),
        ([row.predicted for row in rows], "with joint factors", "o--"),
        ([row.measured_calibration for row in rows], "measured, calibration", "s-"),
        ([row.measured_heldout for row in rows], "measured, held out", "^-"),
    ):
        panel.plot(budgets, values, style, label=label)
    panel.set(
        title="Do single errors add up?",
        xlabel="bits per weight",
        ylabel="squared error of the chunk",
        yscale="log",
    )
    panel.legend()


def _stable_ranks(panel: "Axes", rows: Sequence[Stability]) -> None:
    frames = sorted({row.frames for row in rows})
    for bits in rows[0].spearman if rows else ():
        worst = [min(row.spearman[bits] for row in rows if row.frames == count) for count in frames]
        panel.plot(frames, worst, marker="o", label=f"{bits} bits")
    panel.set(
        title="Ranks of another calibration set",
        xlabel="frames",
        ylabel="Spearman with the table (worst seed)",
        xscale="log",
    )
    if rows:
        panel.legend()


def _cumulative(panel: "Axes", cumulative: Cumulative | None) -> None:
    panel.set_title("Single steps against sums along trajectories")
    if cumulative is None:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
        return
    place = range(len(cumulative.spearman))
    least, median, most = zip(*cumulative.single.values(), strict=True)
    below = [m - low for m, low in zip(median, least, strict=True)]
    above = [high - m for m, high in zip(median, most, strict=True)]
    panel.errorbar(place, median, (below, above), fmt="o", capsize=4, label="one trajectory")
    panel.plot(
        place,
        list(cumulative.spearman.values()),
        "s",
        label=f"mean of {cumulative.trajectories}",
    )
    panel.set_xticks(place, [f"{bits} bits" for bits in cumulative.spearman])
    panel.set_ylabel("Spearman with the table")
    panel.legend()


def _stability(panel: "Axes", rows: Sequence[Stability]) -> None:
    for budget in rows[0].regret if rows else ():
        frames = sorted({row.frames for row in rows})
        worst = [max(row.regret[budget] for row in rows if row.frames == count) for count in frames]
        panel.plot(frames, [100 * value for value in worst], marker="o", label=f"{budget} bits")
    panel.set(
        title="What another calibration set would cost",
        xlabel="frames",
        ylabel="regret, % of the cost (worst seed)",
        xscale="log",
        yscale="symlog",
    )
    if rows:
        panel.set_ylim(bottom=0)
        panel.legend()


def _modules(panel: "Axes", rows: Sequence[ModuleCosts]) -> None:
    ordered = sorted(rows, key=lambda row: row.cost_of_thousand_weights["4"])
    panel.barh(
        [row.module + (" (kept)" if row.kept else "") for row in ordered],
        [row.cost_of_thousand_weights["4"] for row in ordered],
        color=["tab:gray" if row.kept else "tab:blue" for row in ordered],
    )
    panel.set(
        title="Who is sensitive", xlabel="squared error for 1,000 weights at 4 bits", xscale="log"
    )
    panel.tick_params(axis="y", labelsize=7)
