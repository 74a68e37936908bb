"""`qvla measure-solvers`: how each solver's allocation affects the actions."""

from rich.table import Table

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import MeasureSolversConfig as Config
from qvla_jax.progress import ProgressBars
from qvla_jax.report.page import size_text
from qvla_jax.report.svg import number


def main(config: Config) -> Result:
    """Measures the solvers' allocations."""
    with ProgressBars() as progress:
        records = pipeline.measure_solvers(config, progress=progress)
    table = Table("joint action error, SSE", box=None, padding=(0, 1))
    for heading in ("budget", "stored", "predicted", "calibration", "held-out", "paired change"):
        table.add_column(heading, justify="right")
    for heading in ("changed", "measured", "seconds"):
        table.add_column(heading, justify="right")
    for r in records:
        budget = f"{r['budget_bits']:g} bits"
        if "error" in r:
            table.add_row(r["solver"], budget, r["error"])
            continue
        table.add_row(
            r["solver"],
            budget,
            size_text(r["stored_bytes"]),
            number(r["predicted_sse_normalized"]),
            number(r["calibration_sse_normalized"]),
            number(r["heldout_sse_normalized"]),
            f"{r['heldout_change']:+.1e} ± {r['heldout_change_error']:.0e}",
            f"{r['channels_changed']:,}",
            str(r.get("evaluations", 1)),
            f"{r['seconds']:.1f}",
        )
    note = "The paired change is that of the held-out error against the first solver's allocation."
    return Result({"allocations": records}, (table, note))
