"""Stage 6: combine the files of the other stages into report.json and report.html."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qvla_jax.atomic import write_json, write_text
from qvla_jax.evaluation.results import Evaluation, MethodResult
from qvla_jax.evaluation.success import ClosedLoop
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocation, Allocations, load_tables
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.closed_loop import VIDEO_FOLDER
from qvla_jax.pipeline.configs import ReportConfig
from qvla_jax.pipeline.sensitivity import load_ranks, load_seconds
from qvla_jax.plain import to_plain
from qvla_jax.progress import Progress, no_progress
from qvla_jax.report import SensitivityMap, render
from qvla_jax.report.closed_loop import Rollout, choose_rollouts
from qvla_jax.report.contents import (
    AllocationRecord,
    Budget,
    CostSummary,
    LayerFacts,
    RankingFacts,
    Report,
    SensitivityFacts,
    StageSummary,
)
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.sensitivity.validation import Ranking
from qvla_jax.stage_times import StageSeconds


def report(config: ReportConfig, *, progress: Progress = no_progress) -> Report:
    """Writes report.json and report.html.

    Returns:
        The content of report.json.

    Raises:
        InputError: a file is missing, damaged, or does not belong to the others.
    """
    progress("report", 0, 1)
    evaluation = files.read_result(config.out / files.EVALUATION, Evaluation)
    allocations = Allocations.load(config.out / files.ALLOCATION)
    tables = load_tables(config.out)
    calibration = load_calibration(config.out)
    ranks = load_ranks(config.out)
    made_from = {
        files.ALLOCATION: allocations.made_from,
        files.EVALUATION: evaluation.made_from,
        **({} if ranks is None else {files.RANKS: ranks.made_from}),
    }
    remedy = f"run `qvla run --out {config.out}` or the stages after `sensitivity` again"
    for name, found in made_from.items():
        files.check_same(config.out / name, found, files.made_from(tables[0]), remedy=remedy)
    chosen = allocations.chosen
    if evaluation.chosen != chosen.name:
        raise files.stale(config.out / files.EVALUATION, "evaluate")

    # Files of earlier versions have no short names.
    names = [evaluation.short_names.get(path, path) for path in tables[0].index.paths]
    closed_loop: ClosedLoop | None = None
    rollouts: list[Rollout] = []
    if config.simulation is not None:
        closed_loop = files.read_result(config.simulation / files.CLOSED_LOOP, ClosedLoop)
        rollouts = choose_rollouts(config.simulation / VIDEO_FOLDER, closed_loop)
    methods, sweep = split_methods(evaluation.methods, chosen.budget_bits)
    content = Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=evaluation.model,
        packed=evaluation.packed,
        latency=evaluation.latency,
        budget=Budget(bits_per_weight=chosen.budget_bits, bytes=chosen.budget_bytes),
        calibration=calibration.describe(),
        heldout=evaluation.heldout,
        sensitivity=SensitivityFacts(method=tables[0].method, bits=tables[0].bits),
        validation=None if ranks is None else summarize(ranks),
        chosen=chosen.name,
        methods=tuple(methods),
        sweep=tuple(sweep),
        allocations=tuple(map(describe_allocation, allocations.items)),
        front=allocations.front,
        action_names=evaluation.action_names,
        executed_steps=evaluation.executed_steps,
        embeddings=evaluation.embeddings,
        layers=describe_layers(tables[0], chosen, names),
        seconds=StageSummary(
            sensitivity=load_seconds(config.out).get(tables[0].method),
            allocate=sum(a.seconds for a in allocations.items),
            evaluate=evaluation.seconds,
        ),
        stages=load_times(config.out, files.made_from(tables[0])),
        closed_loop=closed_loop,
        provenance=evaluation.provenance,
    )
    page = render(content, _map(tables[0], names), rollouts=rollouts)
    write_json(config.out / files.REPORT_JSON, to_plain(content))
    write_text(config.out / files.REPORT_HTML, page)
    progress("report", 1, 1)
    return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunTimes:
    """The content of run_times.json: where the time of a run went."""

    format: Literal["qvla_jax.run_times"] = "qvla_jax.run_times"
    version: Literal[1] = 1
    # Policy fingerprint and calibration hash.
    made_from: Mapping[str, str]
    stages: tuple[StageSeconds, ...]


def save_times(folder: Path, stages: Sequence[StageSeconds], made_from: Mapping[str, str]) -> None:
    """Keeps where the time of a run went, for this report and later ones."""
    times = RunTimes(made_from=made_from, stages=tuple(stages))
    write_json(folder / files.RUN_TIMES, to_plain(times))


def load_times(folder: Path, made_from: Mapping[str, str]) -> tuple[StageSeconds, ...] | None:
    """What `save_times` kept; None where the stages ran one by one, after it or without it."""
    path = folder / files.RUN_TIMES
    if not path.exists():
        return None
    times = files.read_result(path, RunTimes)
    return times.stages if times.made_from == made_from else None


def split_methods(
    entries: Sequence[MethodResult], budget_bits: float
) -> tuple[list[MethodResult], list[MethodResult]]:
    """Separates the methods at the requested budget from those of the sweep.

    The uniform baseline shown at the budget is the one whose grid has that many bits, or the
    nearest. The stated bytes show what each actually takes.
    """

    def distance(entry: MethodResult) -> float:
        assert entry.requested_bits is not None  # only full precision has none
        return abs(entry.requested_bits - budget_bits)

    nearest = min((e for e in entries if e.family == "uniform"), key=distance, default=None)
    here = [
        e
        for e in entries
        if e.family == "full"
        or e is nearest
        or (e.family != "uniform" and e.requested_bits == budget_bits)
        or (nearest and e.matches_uniform_bits == nearest.requested_bits)
    ]
    order = {"full": 0, "uniform": 1, "baseline": 2, "other_solver": 3, "ours": 4}
    here.sort(key=lambda e: (order[e.family], e.matches_uniform_bits is None))
    return here, [e for e in entries if not any(e is h for h in here)]


def summarize(ranks: Ranking) -> RankingFacts:
    """Leaves out the individual samples."""
    names = [field.name for field in dataclasses.fields(RankingFacts)]
    return RankingFacts(**{name: getattr(ranks, name) for name in names})


def describe_allocation(allocation: Allocation) -> AllocationRecord:
    """States how an allocation was found and how far from the optimum it can be."""
    return AllocationRecord(
        method=allocation.name,
        solver=allocation.solver,
        sensitivity=allocation.sensitivity,
        budget_bits=allocation.budget_bits,
        budget_bytes=allocation.budget_bytes,
        stored_bytes=allocation.stored_bytes,
        budget_read=allocation.budget_read,
        read_bytes=allocation.read_bytes,
        cost=allocation.predicted_sse_normalized,
        lower_bound=allocation.lower_bound,
        seconds=allocation.seconds,
    )


def describe_layers(
    table: SensitivityTable, allocation: Allocation, names: Sequence[str]
) -> tuple[LayerFacts, ...]:
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
        layers.append(
            LayerFacts(
                path=layer.path,
                name=name,
                out_features=layer.out_features,
                fan_in=layer.fan_in,
                channels_by_bits={str(w): int(n) for w, n in zip(widths, counts, strict=True)},
                average_bits=float(bits.mean()),
                sensitivity_by_bits={
                    str(b): CostSummary(
                        median=float(np.median(costs)),
                        max=float(costs.max()),
                        sum=float(costs.sum()),
                    )
                    for b, costs in zip(table.bits, table.costs[rows].T, strict=True)
                },
            )
        )
    return tuple(layers)


def _map(table: SensitivityTable, names: Sequence[str]) -> SensitivityMap:
    return SensitivityMap(names, table.index.offsets.tolist(), table.bits, table.costs)
