"""`qvla allocate`: a bit-width for every channel."""

from rich.table import Table

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import AllocateConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.progress import ProgressBars
from qvla_jax.report.page import size_text
from qvla_jax.report.svg import number


def main(config: Config) -> Result:
    """Allocates bits; returns the result of each solver."""
    with ProgressBars() as progress:
        allocations = pipeline.allocate(config, progress=progress)
    table = Table("allocation", box=None)
    for heading in ("budget", "stored", "cost", "lower bound", "seconds"):
        table.add_column(heading, justify="right")
    for a in allocations.items:
        table.add_row(
            f"{a.sensitivity}, {a.solver}",
            f"{a.budget_bits:g} bits",
            size_text(a.stored_bytes),
            number(a.predicted_sse_normalized),
            number(a.lower_bound),
            f"{a.seconds:.2f}",
        )
    path = config.out / files.ALLOCATION
    found = [{"name": a.name, **a.describe()} for a in allocations.items]
    content = {"chosen": allocations.chosen.name, "allocations": found, "file": str(path)}
    return Result(content, (table, f"Allocation: {path}"))
