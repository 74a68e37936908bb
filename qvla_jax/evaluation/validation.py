"""What validation.json holds: how far a table of sensitivities can be trusted."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qvla_jax.sensitivity.validation import RankCorrelation

VALIDATION_KIND = "qvla_jax.validation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Estimators against exact probing of the same channels on the same frames."""

    channels: int
    frames: int
    # Estimator -> one entry for each option.
    methods: Mapping[str, tuple[RankCorrelation, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Additivity:
    """The joint error of one allocation: predicted and measured.

    All errors are the squared error of the normalized chunk, summed over its entries.
    """

    budget_bits: float
    # Share of the channels.
    pruned: float
    # Sum of the chosen costs, without and with the joint factors.
    summed: float
    predicted: float
    measured_calibration: float
    measured_heldout: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    """The table of another calibration set against this one."""

    frames: int
    seed: int
    # Bits as text -> Spearman's rank correlation of the costs.
    spearman: Mapping[str, float]
    # Budget in bits as text -> cost in this table of the allocation that the other table chooses,
    # over the cost of this table's own choice, minus 1.
    regret: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cumulative:
    """The table, whose frames are drawn independently, against sums along whole trajectories."""

    trajectories: int
    frames: int
    # Steps between frames.
    stride: int
    # Bits as text -> rank correlation, and overlap of the top tenth, of the mean over trajectories.
    spearman: Mapping[str, float]
    top: Mapping[str, float]
    # Bits as text -> least, median and largest rank correlation of one trajectory.
    single: Mapping[str, tuple[float, float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleCosts:
    """Mean costs of one module type."""

    module: str
    # All of its layers keep 16 bits by default.
    kept: bool
    # Output channels; of token embeddings, rows that the calibration frames use.
    channels: int
    weights: int
    # Bits as text -> cost of a channel, and of a thousand weights.
    cost_of_channel: Mapping[str, float]
    cost_of_thousand_weights: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """The row of one token."""

    token: int
    # Frames of the set whose prompt holds it.
    frames: int
    # Bits as text -> cost of rounding this row alone, to first order.
    costs: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingCosts:
    """Costs of the rows of a token embedding."""

    module: str
    rows: int
    # Rows that no prompt of the set holds: they have no measured cost, and count in no sum.
    unmeasured_rows: int
    # Rows that are measured, the most expensive first.
    tokens: tuple[TokenCosts, ...]
    # Bits as text -> sum of the costs, and the measured error with all rows rounded.
    summed: Mapping[str, float]
    measured: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """The content of validation.json."""

    format: Literal["qvla_jax.validation"] = VALIDATION_KIND
    version: Literal[1] = 1
    # Policy fingerprint and calibration hash.
    made_from: Mapping[str, str]
    # What was said about a public directory beyond its files.
    model_options: Mapping[str, Any]
    # Method and options of the table.
    method: str
    bits: tuple[int, ...]
    ranks: Ranks
    additivity: tuple[Additivity, ...]
    stability: tuple[Stability, ...]
    # Of policies that sample: tables of the same frames with other noise, where `seed` is the
    # number of the noise's draw.
    noise: tuple[Stability, ...] = ()
    # None if it was skipped.
    cumulative: Cumulative | None
    # Token embeddings are among them: the rows that are measured.
    modules: tuple[ModuleCosts, ...]
    embeddings: tuple[EmbeddingCosts, ...] = ()
    provenance: Mapping[str, Any]
