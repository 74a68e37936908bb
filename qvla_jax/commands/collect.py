"""`qvla collect`: episodes in LIBERO, as RLDS."""

from rich.table import Table

from qvla_jax.output import Result
from qvla_jax.pipeline.collect import CollectConfig as Config
from qvla_jax.pipeline.collect import collect
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Collects episodes; returns the number for each task."""
    with ProgressBars() as progress:
        collected = collect(config, progress=progress)
    table = Table("task", box=None, padding=(0, 1))
    for heading in ("run", "solved", "kept", "steps kept"):
        table.add_column(heading, justify="right")
    tasks = []
    for task in sorted({r.episode.task for r in collected.results}):
        found = [r for r in collected.results if r.episode.task == task]
        kept = [r for r in collected.kept if r.episode.task == task]
        counts = (len(found), sum(r.success for r in found), len(kept), sum(r.steps for r in kept))
        name = found[0].task_name.replace("_", " ")
        table.add_row(f"{task} {name}", *(f"{count:,}" for count in counts))
        keys = ("run", "solved", "kept", "steps_kept")
        tasks.append({"task": task, "name": name, **dict(zip(keys, counts, strict=True))})
    content = {"dataset": str(collected.folder), "tasks": tasks}
    return Result(content, (table, f"Data set: {collected.folder}"))
