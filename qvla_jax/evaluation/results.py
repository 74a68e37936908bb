"""What evaluation.json holds: each policy's stored size and action errors, and the latency."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from qvla_jax.evaluation.latency import Latency
from qvla_jax.evaluation.offline import ActionErrors
from qvla_jax.plain import ABSENT_IF_NONE, INLINED

EVALUATION_KIND = "qvla_jax.evaluation"

# Full precision; a uniform grid rounded to nearest; another method, or other costs than the run's;
# another solver on the run's costs; the run's own method and solver.
Family: TypeAlias = Literal["full", "uniform", "baseline", "other_solver", "ours"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationFacts:
    """How the bits of an evaluated allocation were found."""

    # Method of the costs, and the solver's registered name.
    sensitivity: str
    solver: str
    bias_correction: bool
    budget_bytes: int
    # Bits of the uniform grid whose bytes are the budget, if it was chosen so.
    matches_uniform_bits: int | None
    # Sum of the chosen costs; None where their unit is not that of the action error.
    predicted_sse_normalized: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One policy on the held-out frames."""

    # Unique name, name to show, and the series (a line of the figures) that it belongs to.
    method: str
    label: str
    series: str
    family: Family
    # Bits of the uniform grid, or the budget in stored bits per quantized weight. Full precision
    # has none.
    requested_bits: float | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    # Of the quantized layers, everything counted (quantization.layout).
    stored_bytes: int
    stored_bits_per_weight: float
    # Of the token embeddings, which are not among these; None where no policy of the run rounds
    # them.
    embedding_bytes: int | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    # Mean width of the weights, without scales and index.
    avg_bits_per_weight: float
    # Bits as text -> channels.
    channels_by_bits: Mapping[str, int]
    # From packed weights, or in float32 on the values of the grids.
    execution: Literal["float32", "packed"]
    versus_full_precision: ActionErrors
    versus_expert: ActionErrors
    # None for policies that are not an allocation of the run.
    allocation: AllocationFacts | None = dataclasses.field(default=None, metadata=INLINED)

    @property
    def matches_uniform_bits(self) -> int | None:
        """Bits of the uniform grid whose bytes are the allocation's budget, if chosen so."""
        return None if self.allocation is None else self.allocation.matches_uniform_bits

    @property
    def predicted_sse_normalized(self) -> float | None:
        """Sum of an allocation's costs; None if there are none in the unit of the error."""
        return None if self.allocation is None else self.allocation.predicted_sse_normalized


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """The full-precision policy of a run."""

    name: str
    # sha256 of its weights and configuration.
    fingerprint: str
    # What was said about a public directory beyond its files.
    options: Mapping[str, Any]
    # All of them, quantized or not.
    parameters: int
    # Quantized layers, their output channels and their weights.
    layers: int
    channels: int
    quantized_weights: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFacts:
    """The run's packed file."""

    # Name of the file in the run's folder.
    file: str
    file_bytes: int
    # Bytes of the quantized layers, and of everything else.
    packed_bytes: int
    other_bytes: int
    # Largest difference of an action entry from the same values in float32.
    largest_action_difference_normalized: float
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingFacts:
    """Token embeddings that a run rounds, in all of its policies but the full-precision one."""

    # Of every row.
    bits: int
    rows: int
    # As rounded, scales included, and in full precision.
    stored_bytes: int
    source_bytes: int
    # Of full precision with these embeddings: the error that they alone make.
    versus_full_precision: ActionErrors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The content of evaluation.json."""

    format: Literal["qvla_jax.evaluation"] = EVALUATION_KIND
    version: Literal[1] = 1
    # Policy fingerprint and calibration hash.
    made_from: Mapping[str, str]
    model: PolicyFacts
    packed: PackedFacts
    # None if it was not measured.
    latency: Latency | None
    # The frames, as `CalibrationSet.describe` has them.
    heldout: Mapping[str, Any]
    # `method` of the run's own allocation.
    chosen: str
    methods: tuple[MethodResult, ...]
    # Path of a quantized layer -> its name in narrow places.
    short_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # What the entries of an action mean; empty if nobody says.
    action_names: tuple[str, ...] = ()
    # Actions of a chunk that errors count, from the first; None: all.
    executed_steps: int | None = None
    # None if they keep their bits.
    embeddings: EmbeddingFacts | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    # Wall-clock time of the stage.
    seconds: float
    provenance: Mapping[str, Any]
