"""The quantizer: grid, rounding and bias correction, with the input statistics that they need.

One object is used wherever rows are quantized: its sensitivities are measured, its table records
it, and `quantize` applies it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.quantization.feedback import feedback_factor, feedback_rows
from qvla_jax.quantization.grid import (
    GRID_BITS,
    PRUNED,
    SOURCE,
    Grid,
    changes_on_grid,
    fitted_clips,
    mixed_levels,
    quantize_mixed,
)
from qvla_jax.quantization.grid import dequantize_rows as dequantize
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.rotation import rotate, rotate_back
from qvla_jax.quantization.statistics import InputStatistics, Weighting

Rounding: TypeAlias = Literal["nearest", "feedback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerSettings:
    """How a row becomes a row of codes and a scale.

    Raises:
        InputError: a value is unknown or out of range.
    """

    # "fitted" (ours) or "rtn" (quantization.grid).
    grid: Grid = "fitted"
    # "nearest", or "feedback": rounding errors move into weights not rounded yet.
    rounding: Rounding = "feedback"
    # What a row loses on the mean input moves into its bias.
    bias_correction: bool = True
    # Of the input statistics for both: "tokens", or "action": a token counts by how much the action
    # depends on the layer there (sensitivity.statistics).
    weighting: Weighting = "tokens"
    # Inputs and rows are rotated (quantization.rotation): for rounded activations.
    rotation: bool = False
    # Of the error feedback: share of the mean input variance added to every variance.
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.grid not in ("fitted", "rtn"):
            raise InputError(f"grid: expected 'fitted' or 'rtn', got {self.grid!r}")
        if self.rounding not in ("nearest", "feedback"):
            raise InputError(f"rounding: expected 'nearest' or 'feedback', got {self.rounding!r}")
        if self.weighting not in ("tokens", "action"):
            raise InputError(f"weighting: expected 'tokens' or 'action', got {self.weighting!r}")
        if not isinstance(self.damping, float) or not 0 < self.damping < float("inf"):
            raise InputError(f"damping: expected a positive number, got {self.damping!r}")

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data enter."""
        return self.bias_correction or self.rounding == "feedback"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizerSettings":
        """From `dataclasses.asdict`; unknown keys raise a TypeError."""
        return cls(**values)


NEAREST_UNCORRECTED = QuantizerSettings(rounding="nearest", bias_correction=False)
UNIFORM_BASELINE = QuantizerSettings(grid="rtn", rounding="nearest", bias_correction=False)
# The same bytes with our grid and error feedback: GPTQ with a searched clip.
UNIFORM_FEEDBACK = QuantizerSettings(bias_correction=False)


class Quantizer:
    """Settings bound to the statistics of a policy's layers."""

    def __init__(self, settings: QuantizerSettings, statistics: InputStatistics | None = None):
        """Binds them.

        Args:
            settings: grid, rounding, bias correction.
            statistics: of the policy's layers; not needed for rounding to nearest without bias
                correction.

        Raises:
            InputError: statistics are needed and not given.
        """
        if statistics is None and settings.needs_statistics:
            raise InputError(
                "bias correction and error feedback need the input statistics of every layer: "
                "pass statistics from sensitivity.input_statistics, or settings that need none"
            )
        self.settings, self.statistics = settings, statistics
        # A layer's factor takes longer than its rows, and one policy is quantized many times.
        self._factor = functools.lru_cache(maxsize=None)(self._compute_factor)

    def check(self, index: ChannelIndex) -> None:
        """Raises an `InputError` unless the statistics fit these layers."""
        if self.statistics is not None and self.settings.needs_statistics:
            found = self.statistics.weighting
            if found != self.settings.weighting:
                raise InputError(
                    f"the input statistics are weighted by {found}, the quantizer's settings want "
                    f"{self.settings.weighting}: measure them again with that weighting"
                )
            feedback = self.settings.rounding == "feedback"
            self.statistics.check(index, covariances=feedback)

    def mean(self, path: str) -> Float[np.ndarray, " k"] | None:
        """E[x] for the bias correction of a layer; None without correction."""
        if self.statistics is None or not self.settings.bias_correction:
            return None
        return self.statistics.means[path]

    def rows(
        self, path: str, weight: Float[Array, "c k"], bits: Int[np.ndarray, " c"]
    ) -> Float[Array, "c k"]:
        """w_hat in float32 where row c has `bits[c]` bits.

        Pruned rows are 0 and 16-bit rows keep their values exactly.

        Args:
            path: the layer.
            weight: its rows.
            bits: 0, 2, 3, 4, 8 or 16 for each row.
        """
        bits = np.asarray(bits)
        if not self.settings.rotation:
            return self.rows_and_scales(path, weight, bits)[0]
        back = rotate_back(self.rows_and_scales(path, rotate(weight), bits)[0])
        return jnp.where(jnp.asarray(bits == SOURCE)[:, None], weight.astype(jnp.float32), back)

    def rows_and_scales(
        self, path: str, weight: Float[Array, "c k"], bits: Int[np.ndarray, " c"]
    ) -> tuple[Float[Array, "c k"], Float[Array, "c 1"]]:
        """W_hat, and the scale s of each row, so that codes are w_hat / s exactly.

        The scale of rows with 0 and 16 bits is 1. With rotation, `weight` and w_hat are rotated
        rows.
        """
        bits, grid = np.asarray(bits, np.int32), self.settings.grid
        codes, scale = quantize_mixed(weight, bits, grid=grid)
        if self.settings.rounding == "nearest" or not np.isin(bits, GRID_BITS).any():
            return _nearest_rows(weight, bits, codes, scale)
        order, factor = self._factor(path)
        return _feedback_rows(weight, bits, scale, order, factor, grid=grid)

    def clips(
        self, weight: Float[Array, "c k"], options: tuple[int, ...]
    ) -> dict[int, Float[Array, "c 1"]]:
        """What `row_changes` takes longest to find out, by bits; empty if it needs nothing."""
        if self.settings.grid != "fitted" or not self._rounds_rows_alone:
            return {}
        return {b: fitted_clips(weight, b) for b in options if b in GRID_BITS}

    def row_changes(
        self,
        path: str,
        weight: Float[Array, "c k"],
        options: tuple[int, ...],
        *,
        clips: Mapping[int, Float[Array, "c 1"]] | None = None,
    ) -> Float[Array, "n c k"]:
        """w_hat - w in float32 of every row under every option; exactly 0 for 16 bits.

        Args:
            path: the layer.
            weight: its rows.
            options: out of 0, 2, 3, 4, 8 and 16.
            clips: what `clips` gave for the same weight; None searches them again.
        """
        if self._rounds_rows_alone:
            return changes_on_grid(weight, options, grid=self.settings.grid, clips=clips or {})
        source = weight.astype(jnp.float32)
        rows = [self.rows(path, source, np.full(len(source), bits)) for bits in options]
        return _changes(source, rows)

    @property
    def _rounds_rows_alone(self) -> bool:
        """Whether a row's codes depend on its own weights only, one by one."""
        return self.settings.rounding == "nearest" and not self.settings.rotation

    def _compute_factor(self, path: str) -> tuple[jax.Array, jax.Array]:
        assert self.statistics is not None
        second_moment = self.statistics.covariance(path)
        if not self.settings.bias_correction:
            # The error on the mean input stays in the output, so it counts.
            mean = self.statistics.means[path]
            second_moment = second_moment + np.outer(mean, mean)
        if self.settings.rotation:
            second_moment = np.asarray(rotate(rotate(jnp.asarray(second_moment, jnp.float32)).T))
        order, factor = feedback_factor(second_moment, self.settings.damping)
        return jnp.asarray(order), jnp.asarray(factor)


@jax.jit
def _nearest_rows(
    weight: Float[Array, "c k"],
    bits: Int[Array, " c"],
    codes: Float[Array, "c k"],
    scale: Float[Array, "c 1"],
) -> tuple[Float[Array, "c k"], Float[Array, "c 1"]]:
    return _where_on_grid(weight.astype(jnp.float32), bits, dequantize(codes, scale), scale)


@functools.partial(jax.jit, static_argnames="grid")
def _feedback_rows(
    weight: Float[Array, "c k"],
    bits: Int[Array, " c"],
    scale: Float[Array, "c 1"],
    order: Int[Array, " k"],
    factor: Float[Array, "k k"],
    *,
    grid: Grid,
) -> tuple[Float[Array, "c k"], Float[Array, "c 1"]]:
    source = weight.astype(jnp.float32)
    code_levels = mixed_levels(bits, grid)[..., 0]
    rounded = feedback_rows(source, scale, code_levels, order, factor)
    return _where_on_grid(source, bits, rounded, scale)


def _where_on_grid(
    source: Float[Array, "c k"],
    bits: Int[Array, " c"],
    values: Float[Array, "c k"],
    scale: Float[Array, "c 1"],
) -> tuple[Float[Array, "c k"], Float[Array, "c 1"]]:
    """Pruned rows are 0 and 16-bit rows the source's, both with a scale of 1."""
    pruned, kept = (bits == PRUNED)[:, None], (bits == SOURCE)[:, None]
    values = jnp.where(pruned, 0.0, jnp.where(kept, source, values))
    return values, jnp.where(pruned | kept, 1.0, scale)


@jax.jit
def _changes(source: Float[Array, "c k"], rows: list[Array]) -> Float[Array, "n c k"]:
    return jnp.stack(rows) - source[None]
