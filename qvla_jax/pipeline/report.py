"""Stage 6: combine the files of the other stages into report.json and report.html."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.atomic import write_json, write_text
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocation, Allocations, load_tables
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.closed_loop import SUMMARY_KIND, VIDEO_FOLDER
from qvla_jax.pipeline.configs import ReportConfig
from qvla_jax.pipeline.evaluate import EVALUATION_KIND
from qvla_jax.pipeline.sensitivity import load_ranks, load_seconds
from qvla_jax.progress import Progress, no_progress
from qvla_jax.report import SensitivityMap, render
from qvla_jax.report.closed_loop import Rollout, choose_rollouts
from qvla_jax.sensitivity.table import SensitivityTable

KIND = "qvla_jax.report"
RUN_TIMES_KIND = "qvla_jax.run_times"


def report(config: ReportConfig, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Writes report.json and report.html.

    Returns:
        The content of report.json.

    Raises:
        InputError: a file is missing, damaged, or does not belong to the others.
    """
    progress("report", 0, 1)
    evaluation = files.read_json(config.out / files.EVALUATION, kind=EVALUATION_KIND)
    allocations = Allocations.load(config.out / files.ALLOCATION)
    tables = load_tables(config.out)
    calibration = load_calibration(config.out)
    ranks = load_ranks(config.out)
    made_from = {
        files.ALLOCATION: allocations.made_from,
        files.EVALUATION: evaluation["made_from"],
        **({} if ranks is None else {files.RANKS: ranks["made_from"]}),
    }
    remedy = f"run `qvla run --out {config.out}` or the stages after `sensitivity` again"
    for name, found in made_from.items():
        files.check_same(config.out / name, found, files.made_from(tables[0]), remedy=remedy)
    if evaluation["chosen"] != allocations.chosen.name:
        raise files.stale(config.out / files.EVALUATION, "evaluate")

    chosen = allocations.chosen
    # Files of earlier versions have no short names.
    known = evaluation.get("short_names", {})
    names = [known.get(path, path) for path in tables[0].index.paths]
    methods, sweep = split_methods(evaluation["methods"], chosen.budget_bits)
    content = {
        "format": KIND,
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": evaluation["model"],
        "packed": evaluation["packed"],
        "latency": evaluation["latency"],
        "budget": {"bits_per_weight": chosen.budget_bits, "bytes": chosen.budget_bytes},
        "calibration": calibration.describe(),
        "heldout": evaluation["heldout"],
        "sensitivity": {"method": tables[0].method, "bits": list(tables[0].bits)},
        "validation": None if ranks is None else summarize(ranks),
        "chosen": chosen.name,
        "methods": methods,
        "sweep": sweep,
        "allocations": [describe_allocation(a) for a in allocations.items],
        "action_names": evaluation.get("action_names", []),
        "layers": describe_layers(tables[0], chosen, names),
        "seconds": {
            "sensitivity": load_seconds(config.out).get(tables[0].method),
            "allocate": sum(a.seconds for a in allocations.items),
            "evaluate": evaluation["seconds"],
        },
        "stages": load_times(config.out, files.made_from(tables[0])),
        "closed_loop": None,
        "provenance": evaluation["provenance"],
    }
    rollouts: list[Rollout] = []
    if config.simulation is not None:
        summary = files.read_json(config.simulation / files.CLOSED_LOOP, kind=SUMMARY_KIND)
        content["closed_loop"] = summary
        rollouts = choose_rollouts(config.simulation / VIDEO_FOLDER, summary)
    page = render(content, _map(tables[0], names), rollouts=rollouts)
    write_json(config.out / files.REPORT_JSON, content)
    write_text(config.out / files.REPORT_HTML, page)
    progress("report", 1, 1)
    return content


def save_times(
    folder: Path, stages: Sequence[Mapping[str, Any]], made_from: Mapping[str, str]
) -> None:
    """Keeps where the time of a run went, for this report and later ones."""
    header = {"format": RUN_TIMES_KIND, "version": 1, "made_from": made_from}
    write_json(folder / files.RUN_TIMES, {**header, "stages": stages})


def load_times(folder: Path, made_from: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """What `save_times` kept; None where the stages ran one by one, after it or without it."""
    path = folder / files.RUN_TIMES
    if not path.exists():
        return None
    content = files.read_json(path, kind=RUN_TIMES_KIND)
    return content["stages"] if content["made_from"] == made_from else None


def split_methods(
    entries: Sequence[dict[str, Any]], budget_bits: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Separates the methods at the requested budget from those of the sweep.

    The uniform baseline shown at the budget is the one whose grid has that many bits, or the
    nearest. The stated bytes show what each actually takes.
    """
    uniform = [e for e in entries if e["family"] == "uniform"]
    nearest = min(uniform, key=lambda e: abs(e["requested_bits"] - budget_bits), default=None)
    here = [
        e
        for e in entries
        if e["family"] == "full"
        or e is nearest
        or (e["family"] != "uniform" and e["requested_bits"] == budget_bits)
        or (nearest and e.get("matches_uniform_bits") == nearest["requested_bits"])
    ]
    order = {"full": 0, "uniform": 1, "baseline": 2, "other_solver": 3, "ours": 4}
    here.sort(key=lambda e: (order[e["family"]], e.get("matches_uniform_bits") is None))
    return here, [e for e in entries if not any(e is h for h in here)]


def summarize(ranks: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the individual samples."""
    return {key: ranks[key] for key in ("channels", "frames", "spearman", "spearman_table")}


def describe_allocation(allocation: Allocation) -> dict[str, Any]:
    """States how an allocation was found and how far from the optimum it can be."""
    return {
        "method": allocation.name,
        "solver": allocation.solver,
        "sensitivity": allocation.sensitivity,
        "budget_bits": allocation.budget_bits,
        "budget_bytes": allocation.budget_bytes,
        "stored_bytes": allocation.stored_bytes,
        "cost": allocation.predicted_sse_normalized,
        "lower_bound": allocation.lower_bound,
        "seconds": allocation.seconds,
    }


def describe_layers(
    table: SensitivityTable, allocation: Allocation, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Summarizes each layer: its size, its bits, and how sensitive its channels are.

    Args:
        table: costs.
        allocation: bits.
        names: the layers' short names.
    """
    layers = []
    for name, (layer, rows) in zip(names, table.index.items(), strict=True):
        bits = allocation.bits[rows]
        widths, counts = np.unique(bits, return_counts=True)
        costs = table.costs[rows]
        layers.append(
            {
                "path": layer.path,
                "name": name,
                "out_features": layer.out_features,
                "fan_in": layer.fan_in,
                "channels_by_bits": {str(w): int(n) for w, n in zip(widths, counts, strict=True)},
                "average_bits": float(bits.mean()),
                "sensitivity_by_bits": {
                    str(b): {
                        "median": float(np.median(costs[:, i])),
                        "max": float(costs[:, i].max()),
                        "sum": float(costs[:, i].sum()),
                    }
                    for i, b in enumerate(table.bits)
                },
            }
        )
    return layers


def _map(table: SensitivityTable, names: Sequence[str]) -> SensitivityMap:
    return SensitivityMap(names, table.index.offsets.tolist(), table.bits, table.costs)
