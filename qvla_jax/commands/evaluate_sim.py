"""`qvla evaluate --sim`: the success in LIBERO."""

from rich.table import Table

from qvla_jax.output import Result
from qvla_jax.pipeline import closed_loop, files
from qvla_jax.pipeline.closed_loop import ClosedLoopConfig as Config
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars
from qvla_jax.report.terminal import comparison_table, drift_line, motion_line, success_table


def main(config: Config) -> Result:
    """Runs policies in the simulator; returns their success."""
    with ProgressBars() as progress:
        summary = closed_loop.closed_loop(config, progress=progress)
    lines: list[str | Table] = [success_table(summary.policies)]
    for comparison in summary.comparisons:
        lines += ["", comparison_table(comparison)]
        if comparison.motion is not None:
            lines.append(motion_line(comparison.motion))
        if comparison.drift is not None:
            lines.append(drift_line(comparison.drift))
    episodes, file = config.out / closed_loop.EPISODES_FILE, config.out / files.CLOSED_LOOP
    lines.append(f"Episodes: {episodes}; summary: {file}")
    return Result(to_plain(summary), tuple(lines))
