"""The quantizer: grid, rounding and bias correction, with the input statistics that they need.

One object is used wherever rows are quantized: its sensitivities are measured, its table records
it, and `quantize` applies it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Array, Float, Int, Int8
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import GRID_BITS, GRIDS, PRUNED, SOURCE, Grid
from qvla_jax.quantization.feedback import feedback_factor, feedback_rows
from qvla_jax.quantization.grid import changes_on_grid, fitted_clips, mixed_levels, quantize_mixed
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.rotation import rotate, rotate_back
from qvla_jax.quantization.rows import QuantizedRows
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
    # The row's error on the mean input moves into its bias.
    bias_correction: bool = True
    # How tokens are weighted in the input statistics for both: "tokens" weights them equally,
    # "action" by how much the action depends on the layer there (sensitivity.statistics).
    weighting: Weighting = "tokens"
    # Rotate inputs and rows (quantization.rotation), for rounded activations.
    rotation: bool = False
    # Damping of the error feedback: share of the mean input variance added to every variance.
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            expected = " or ".join(map(repr, GRIDS))
            raise InputError(f"grid: expected {expected}, got {self.grid!r}")
        if self.rounding not in ("nearest", "feedback"):
            raise InputError(f"rounding: expected 'nearest' or 'feedback', got {self.rounding!r}")
        if self.weighting not in ("tokens", "action"):
            raise InputError(f"weighting: expected 'tokens' or 'action', got {self.weighting!r}")
        if not isinstance(self.damping, float) or not 0 < self.damping < float("inf"):
            raise InputError(f"damping: expected a positive number, got {self.damping!r}")

    @property
    def needs_statistics(self) -> bool:
        """Whether the quantizer needs calibration data."""
        return self.bias_correction or self.rounding == "feedback"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizerSettings":
        """From `dataclasses.asdict`; unknown keys raise a TypeError."""
        return cls(**values)


NEAREST_UNCORRECTED = QuantizerSettings(rounding="nearest", bias_correction=False)
UNIFORM_BASELINE = QuantizerSettings(grid="rtn", rounding="nearest", bias_correction=False)
# The same bytes with our grid and error feedback: GPTQ with a searched clip.
UNIFORM_FEEDBACK = QuantizerSettings(bias_correction=False)


# Bytes of factors that a quantizer keeps: enough for a small policy, or for some layers at 7B.
_FACTOR_BYTES: Final = 2**30


class _BoundedCache:
    """Results of a function by path; keeps the latest that fit in a number of bytes."""

    def __init__(
        self,
        compute: Callable[[str], tuple[jax.Array, jax.Array]],
        limit: int = _FACTOR_BYTES,
    ):
        self._compute, self._limit = compute, limit
        self._kept: dict[str, tuple[jax.Array, jax.Array]] = {}

    def __call__(self, path: str) -> tuple[jax.Array, jax.Array]:
        found = self._kept.pop(path, None)
        found = self._compute(path) if found is None else found
        self._kept[path] = found  # last in order: the latest
        held = sum(array.nbytes for arrays in self._kept.values() for array in arrays)
        for oldest in list(self._kept)[:-1]:
            if held <= self._limit:
                break
            held -= sum(array.nbytes for array in self._kept.pop(oldest))
        return found


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
        self._factors = _BoundedCache(self._compute_factor)

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
            return self.quantized(path, weight, bits).dequantized(weight)
        rotated = rotate(weight)
        back = rotate_back(self.quantized(path, rotated, bits).dequantized(rotated))
        return jnp.where(jnp.asarray(bits == SOURCE)[:, None], weight.astype(jnp.float32), back)

    def quantized(
        self, path: str, weight: Float[Array, "c k"], bits: Int[np.ndarray, " c"]
    ) -> QuantizedRows:
        """Codes and scales where row c has `bits[c]` bits.

        The scale of rows with 0 and 16 bits is 1. With rotation, `weight` holds rotated rows.
        """
        bits, grid = np.asarray(bits, np.int32), self.settings.grid
        codes, scales = quantize_mixed(weight, bits, grid=grid)
        if self.settings.rounding == "nearest" or not np.isin(bits, GRID_BITS).any():
            codes = codes.astype(jnp.int8)
        else:
            codes = _feedback_codes(weight, bits, scales, *self._factors(path), grid=grid)
        return QuantizedRows(bits=bits, codes=codes, scales=_one_off_grid(bits, scales), grid=grid)

    def clips(
        self, weight: Float[Array, "c k"], options: tuple[int, ...]
    ) -> dict[int, Float[Array, "c 1"]]:
        """The costly part of `row_changes`, by bits; empty if there is none."""
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


@functools.partial(jax.jit, static_argnames="grid")
def _feedback_codes(
    weight: Float[Array, "c k"],
    bits: Int[Array, " c"],
    scale: Float[Array, "c 1"],
    order: Int[Array, " k"],
    factor: Float[Array, "k k"],
    *,
    grid: Grid,
) -> Int8[Array, "c k"]:
    return feedback_rows(
        weight.astype(jnp.float32), scale, mixed_levels(bits, grid)[..., 0], order, factor
    )


@jax.jit
def _one_off_grid(bits: Int[Array, " c"], scale: Float[Array, "c 1"]) -> Float[Array, "c 1"]:
    return jnp.where(((bits == PRUNED) | (bits == SOURCE))[:, None], 1.0, scale)


@jax.jit
def _changes(source: Float[Array, "c k"], rows: list[Array]) -> Float[Array, "n c k"]:
    return jnp.stack(rows) - source[None]
