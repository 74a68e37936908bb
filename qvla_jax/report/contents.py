"""What report.json holds; docs/file_formats.md describes the file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qvla_jax.evaluation.latency import Latency
from qvla_jax.evaluation.results import EmbeddingFacts, MethodResult, PackedFacts, PolicyFacts
from qvla_jax.evaluation.success import ClosedLoop
from qvla_jax.plain import ABSENT_IF_NONE
from qvla_jax.quantization.allocation import FrontPoint
from qvla_jax.sensitivity.validation import RankCorrelation
from qvla_jax.stage_times import StageSeconds

REPORT_KIND = "qvla_jax.report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be stored for the quantized layers."""

    # Everything counted: scales, biases, index, padding.
    bits_per_weight: float
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityFacts:
    """Where the costs come from."""

    method: str
    # The options of a channel.
    bits: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingFacts:
    """The rank correlations of ranks.json, without its samples."""

    channels: int
    frames: int
    # The method on the probed frames, and the table that the allocation used.
    spearman: tuple[RankCorrelation, ...]
    spearman_table: tuple[RankCorrelation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """How an allocation was found, and how far from the optimum it can be."""

    # The allocation's name, as in `MethodResult.method`.
    method: str
    solver: str
    sensitivity: str
    budget_bits: float
    budget_bytes: int
    stored_bytes: int
    # Bits per weight that a call may read, where that is a budget, and bytes that it reads.
    budget_read: float | None = None
    read_bytes: int | None = None
    # Sum of the chosen costs, and a bound below it.
    cost: float
    lower_bound: float
    # Of the solver.
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostSummary:
    """Costs of a layer's channels under one option."""

    median: float
    max: float
    sum: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A quantized layer: its size, its chosen bits, and how sensitive its channels are."""

    path: str
    # For narrow places.
    name: str
    out_features: int
    fan_in: int
    # Bits as text -> channels.
    channels_by_bits: Mapping[str, int]
    average_bits: float
    # Bits as text -> costs of the channels.
    sensitivity_by_bits: Mapping[str, CostSummary]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSummary:
    """Wall-clock seconds of stages."""

    # None if it was not recorded.
    sensitivity: float | None
    # Of all solvers together.
    allocate: float
    evaluate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The content of report.json."""

    format: Literal["qvla_jax.report"] = REPORT_KIND
    version: Literal[1] = 1
    # Time in UTC, ISO 8601.
    created: str
    model: PolicyFacts
    packed: PackedFacts
    latency: Latency | None
    budget: Budget
    # Frames, as `CalibrationSet.describe` has them.
    calibration: Mapping[str, Any]
    heldout: Mapping[str, Any]
    sensitivity: SensitivityFacts
    # None if no channel was probed exactly.
    validation: RankingFacts | None
    # `method` of the run's own allocation.
    chosen: str
    # At the requested budget, and at the others.
    methods: tuple[MethodResult, ...]
    sweep: tuple[MethodResult, ...]
    allocations: tuple[AllocationRecord, ...]
    # Bytes stored against bytes read in a call, at the errors of the budgets; empty where a call
    # reads every weight once.
    front: tuple[FrontPoint, ...] = ()
    # What the entries of an action mean; empty if nobody says.
    action_names: tuple[str, ...]
    # Actions of a chunk that errors count, from the first; None: all.
    executed_steps: int | None = None
    # Token embeddings, if the run rounds them.
    embeddings: EmbeddingFacts | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    layers: tuple[LayerFacts, ...]
    seconds: StageSummary
    # None where the stages ran one by one.
    stages: tuple[StageSeconds, ...] | None
    # None without a simulation.
    closed_loop: ClosedLoop | None
    provenance: Mapping[str, Any]

    @property
    def ours(self) -> MethodResult:
        """The run's own allocation."""
        return next(e for e in self.methods if e.method == self.chosen)
