"""Results as tables and lines for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from qvla_jax.evaluation.drift import Drift
from qvla_jax.evaluation.motion import Motion, Ratio
from qvla_jax.evaluation.paired import Comparison, Success
from qvla_jax.evaluation.results import MethodResult
from qvla_jax.evaluation.success import PolicyComparison, PolicySuccess
from qvla_jax.report.contents import RankingFacts
from qvla_jax.report.page import size_text, stage_rows
from qvla_jax.report.svg import number
from qvla_jax.sensitivity.validation import Ranking
from qvla_jax.stage_times import StageSeconds


def spearman_line(ranking: Ranking | RankingFacts, method: str) -> str:
    """Returns the rank correlations in one line."""
    ranks = ", ".join(f"{r.spearman:.4f} at {r.bits} bits" for r in ranking.spearman)
    return f"Spearman({method}, exact) on {ranking.channels} channels: {ranks}"


def methods_table(entries: Sequence[MethodResult]) -> Table:
    """Returns the table of methods: bytes, bits and errors."""
    table = Table("method", box=None, padding=(0, 1))
    for heading in ("stored", "bits/weight", "MSE", "L1", "worst", "grip flips", "L1 expert"):
        table.add_column(heading, justify="right")
    for e in entries:
        errors = e.versus_full_precision
        full = e.family == "full"
        table.add_row(
            e.label,
            size_text(e.stored_bytes),
            f"{e.stored_bits_per_weight:.2f}",
            "-" if full else number(errors.action_mse_normalized),
            "-" if full else number(errors.action_l1_normalized),
            "-" if full else number(max(errors.worst_by_dimension)),
            "-" if full else f"{errors.gripper_flip_rate:.2%}",
            f"{e.versus_expert.action_l1_normalized:.4f}",
        )
    return table


def times_table(stages: Sequence[StageSeconds]) -> Table:
    """Returns where the time of a run went."""
    table = Table("where the time goes", box=None, padding=(0, 1))
    for heading in ("seconds", "of these compiling", "CPU seconds"):
        table.add_column(heading, justify="right")
    for name, *values in stage_rows(stages):
        table.add_row(name, *(f"{value:.1f}" for value in values))
    return table


def success_table(policies: Sequence[PolicySuccess]) -> Table:
    """Returns the success of each policy, per task and overall, with Wilson's 95 % intervals."""
    table = Table("success (95 % interval)", box=None, padding=(0, 1))
    for entry in policies:
        table.add_column(entry.policy, justify="right")
    for rows in zip(*(entry.tasks for entry in policies), strict=True):
        table.add_row(
            f"{rows[0].task} {rows[0].task_name.replace('_', ' ')}",
            *(success_text(row) for row in rows),
        )
    table.add_row("all", *(success_text(entry.overall) for entry in policies))
    return table


def success_text(success: Success) -> str:
    """Returns a success rate with its counts and its interval."""
    low, high = success.interval_95
    return f"{success.successes}/{success.episodes} = {success.rate:.1%} ({low:.0%} to {high:.0%})"


def comparison_table(comparison: PolicyComparison) -> Table:
    """Returns a paired comparison, per task and overall."""
    table = Table(
        f"{comparison.candidate} against {comparison.reference}", box=None, padding=(0, 1)
    )
    for heading in ("pairs", "only it solves", "only the other", "difference (95 %)", "p, McNemar"):
        table.add_column(heading, justify="right")
    rows: list[tuple[str, Comparison]] = [(str(row.task), row) for row in comparison.tasks]
    for label, row in [*rows, ("all", comparison.overall)]:
        low, high = row.interval_95
        table.add_row(
            label,
            str(row.episodes),
            str(row.candidate_only),
            str(row.reference_only),
            f"{row.difference:+.1%} ({low:+.0%} to {high:+.0%})",
            f"{row.mcnemar_exact_p:.3g}",
        )
    return table


def motion_line(motion: Motion) -> str:
    """Returns how a policy moves against the reference, in words."""
    text = f"Where both succeed ({motion.pairs} episodes): {_ratio_text(motion.steps)} the steps"
    return text if motion.jerk is None else f"{text}, {_ratio_text(motion.jerk)} the jerk"


def _ratio_text(ratio: Ratio) -> str:
    if ratio.interval_95 is None:
        return f"{ratio.mean:.2f} times"
    low, high = ratio.interval_95
    return f"{ratio.mean:.2f} times ({low:.2f} to {high:.2f})"


def drift_line(drift: Drift) -> str:
    """Returns how far a policy drifts from the reference, in words."""
    at = min(range(len(drift.seconds)), key=lambda k: abs(drift.seconds[k] - 2.0))
    text = (
        f"End effectors after {drift.seconds[at]:.1f} s: "
        f"{100 * drift.distance_median[at]:.1f}"
        f" cm apart (median of {drift.pairs[at]} pairs)"
    )
    if drift.deviation_total is None:
        return text
    error = drift.deviation_standard_error
    spread = "" if error is None else f" ± {number(error)}"
    return (
        f"{text}; action deviation accumulated along the reference's rollouts: "
        f"{number(drift.deviation_total)}{spread} ({drift.deviation_episodes} episodes)"
    )


def sweep_table(entries: Sequence[MethodResult]) -> Table:
    """Returns our errors over the budgets: measured, predicted, and next to a uniform grid's.

    A grid is compared where the budget was its stored bytes.
    """
    uniform = {e.requested_bits: e for e in entries if e.family == "uniform"}
    table = Table("budget", box=None, padding=(0, 1))
    for heading in ("stored", "MSE", "uniform MSE", "times less", "SSE predicted", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("ratio", justify="right")
    ours = [e for e in entries if e.family == "ours"]
    for e in sorted(ours, key=lambda e: e.stored_bytes):
        errors = e.versus_full_precision
        mse, sse = errors.action_mse_normalized, errors.action_sse_normalized
        predicted, bits = e.predicted_sse_normalized or 0.0, e.matches_uniform_bits
        other = times = "-"
        if bits in uniform:
            grid = uniform[bits].versus_full_precision.action_mse_normalized
            other, times = number(grid), number(grid / mse) if mse else "-"
        table.add_row(
            f"{e.requested_bits:g} bits" if bits is None else f"uniform {bits} bits",
            size_text(e.stored_bytes),
            number(mse),
            other,
            times,
            number(predicted),
            number(sse),
            number(sse / predicted) if predicted else "-",
        )
    return table
