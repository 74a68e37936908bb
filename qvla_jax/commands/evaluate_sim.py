"""`qvla evaluate --sim`: the success in LIBERO."""

from rich.table import Table

from qvla_jax.output import Result
from qvla_jax.pipeline import closed_loop, files
from qvla_jax.pipeline.closed_loop import ClosedLoopConfig as Config
from qvla_jax.progress import ProgressBars
from qvla_jax.report.terminal import comparison_table, drift_line, success_table


def main(config: Config) -> Result:
    """Runs policies in the simulator; returns their success."""
    with ProgressBars() as progress:
        content = closed_loop.closed_loop(config, progress=progress)
    lines: list[str | Table] = [success_table(content["policies"])]
    for comparison in content["comparisons"]:
        lines += ["", comparison_table(comparison)]
        if comparison["drift"]:
            lines.append(drift_line(comparison["drift"]))
    episodes, summary = config.out / closed_loop.EPISODES_FILE, config.out / files.CLOSED_LOOP
    lines.append(f"Episodes: {episodes}; summary: {summary}")
    return Result(content, tuple(lines))
