"""What study.json holds: methods against settings on one policy, offline and in closed loop."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qvla_jax.evaluation.offline import ActionErrors
from qvla_jax.evaluation.paired import Comparison
from qvla_jax.evaluation.success import EpisodesSuccess
from qvla_jax.plain import ABSENT_IF_NONE, INLINED

STUDY_KIND = "qvla_jax.study"
CELL_KIND = "qvla_jax.cell"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellErrors:
    """The size and the offline errors of a cell's policy."""

    # Of the quantized layers, everything counted.
    stored_bytes: int
    stored_bits_per_weight: float
    versus_full_precision: ActionErrors


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellSuccess:
    """The success of a cell's policy, on episodes that full precision has run as well."""

    success: EpisodesSuccess
    # Successes over those of full precision in the same episodes; None if it has none.
    share_of_full_precision: float | None
    paired: Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one setting."""

    row: str
    column: str
    activation_bits: float
    # Full name of the method with its setting, and the method's title.
    method: str
    title: str
    # Why there is no such policy, if there is none.
    unavailable: str | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    # None if it is unavailable.
    errors: CellErrors | None = dataclasses.field(default=None, metadata=INLINED)
    # None if no episode is finished.
    closed_loop: CellSuccess | None = dataclasses.field(default=None, metadata=INLINED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodErrors:
    """What is kept of a cell, whatever row and column show it."""

    method: str
    title: str
    errors: CellErrors | None = dataclasses.field(default=None, metadata=INLINED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCell:
    """The content of a cell's file."""

    format: Literal["qvla_jax.cell"] = CELL_KIND
    version: Literal[1] = 1
    # Policy, calibration and held-out frames, packed file, and the measures taken.
    made_from: Mapping[str, Any]
    cell: MethodErrors


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPolicy:
    """The full-precision policy of a study."""

    # The user's name for it.
    name: str
    # What was said about a public directory beyond its files.
    options: Mapping[str, Any]
    quantized_weights: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullPrecision:
    """The reference of all cells."""

    # Of the layers that cells quantize.
    stored_bytes: int
    # None if no episode is finished.
    success: EpisodesSuccess | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuccessRanks:
    """Spearman's rank correlation of offline measures with success.

    Both are None if fewer than 3 policies have success, or if it is the same for all.
    """

    # Those whose success is known.
    policies: int | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)
    # Measure -> rank correlation.
    spearman: Mapping[str, float] | None = dataclasses.field(default=None, metadata=ABSENT_IF_NONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The content of study.json."""

    format: Literal["qvla_jax.study"] = STUDY_KIND
    version: Literal[1] = 1
    # Policy fingerprint and calibration hash.
    made_from: Mapping[str, str]
    model: StudyPolicy
    # The frames, as `CalibrationSet.describe` has them.
    heldout: Mapping[str, Any]
    # LIBERO's name of the suite; None offline.
    sim: str | None
    full_precision: FullPrecision
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    rank_correlation_with_success: SuccessRanks
    provenance: Mapping[str, Any]
