"""Converts between metric units and the normalized space of the policies.

Two numbers of each entry map to -1 and 1: the quantiles q01 and q99 (OpenVLA's `BOUNDS_Q99`) or the
minimum and maximum (`BOUNDS`, as OpenVLA-OFT has it for ALOHA). Values outside are clipped. Entries
whose mask is False (the gripper) are not scaled: those of actions stay unchanged, those of the
state are clipped as well, as in the public `normalize_proprio`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Bool, Float
from qvla_jax.errors import CheckpointError

# As in OpenVLA-OFT: keeps entries without spread finite.
_EPSILON = 1e-8
# The keys that a normalization reads from a block of the statistics.
BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
}


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Normalizes the last axis of actions or proprio."""

    # What maps to -1, and to 1.
    low: Float[np.ndarray, " a"]
    high: Float[np.ndarray, " a"]
    mask: Bool[np.ndarray, " a"]
    # Whether entries whose mask is False are clipped to [-1, 1].
    clip_unscaled: bool = False

    @classmethod
    def from_statistics(
        cls,
        statistics: Mapping[str, Any],
        *,
        where: str,
        kind: str = "quantiles",
        clip_unscaled: bool = False,
    ) -> "Normalizer":
        """From one block (`action` or `proprio`) of a public dataset_statistics.json.

        Entries whose mask is False are not used, and may hold anything.

        Args:
            statistics: the block.
            where: file and block, for errors.
            kind: a key of `BOUNDS`.
            clip_unscaled: clip entries whose mask is False, as of the robot's state.

        Raises:
            CheckpointError: a key is missing, lengths differ, or a value is not a finite number.
        """
        low, high = BOUNDS[kind]
        for name in (low, high):
            if name not in statistics:
                raise CheckpointError(f"{where}: {name!r} is missing, which the policy scales by")
        bounds = [_numbers(statistics[name], f"{where}.{name}") for name in (low, high)]
        shape = bounds[0].shape
        mask = _mask(statistics.get("mask", [True] * len(bounds[0])), f"{where}.mask")
        if not shape == bounds[1].shape == mask.shape:
            raise CheckpointError(
                f"{where}: {low}, {high} and mask have shapes {shape}, {bounds[1].shape}, "
                f"{mask.shape}; they must be equally long lists"
            )
        for name, values in zip((low, high), bounds, strict=True):
            wrong = np.flatnonzero(mask & ~np.isfinite(values))
            if len(wrong):
                raise CheckpointError(
                    f"{where}: {name!r} holds NaN or inf at place {wrong[0]}, which the policy "
                    "scales by"
                )
        used_low, used_high = (np.where(mask, values, 0.0) for values in bounds)
        return cls(low=used_low, high=used_high, mask=mask, clip_unscaled=clip_unscaled)

    @property
    def units(self) -> Float[np.ndarray, " a"]:
        """Metric units in one unit of the normalized space."""
        return np.where(self.mask, 0.5 * (self.high - self.low + _EPSILON), 1.0)

    def normalize(self, values: Float[np.ndarray, "... a"]) -> Float[np.ndarray, "... a"]:
        """Metric units -> [-1, 1], float32."""
        values = np.asarray(values)
        scaled = 2.0 * (values - self.low) / (self.high - self.low + _EPSILON) - 1.0
        unscaled = np.clip(values, -1.0, 1.0) if self.clip_unscaled else values
        return np.where(self.mask, np.clip(scaled, -1.0, 1.0), unscaled).astype(np.float32)

    def unnormalize(self, values: Float[np.ndarray, "... a"]) -> Float[np.ndarray, "... a"]:
        """[-1, 1] -> metric units, float32."""
        values = np.asarray(values)
        scaled = (values + 1.0) * self.units + self.low
        return np.where(self.mask, scaled, values).astype(np.float32)


def _numbers(values: Any, where: str) -> Float[np.ndarray, " a"]:
    """A list of numbers; null, which represents NaN and inf, becomes NaN."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise CheckpointError(f"{where}: expected a list of numbers, found {values!r:.80}")
    for place, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{where}[{place}]: expected a number, found {value!r:.80}")
    try:
        return np.array([np.nan if value is None else value for value in values], np.float64)
    except OverflowError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _mask(values: Any, where: str) -> Bool[np.ndarray, " a"]:
    if not isinstance(values, Sequence) or not all(isinstance(v, bool) for v in values):
        raise CheckpointError(f"{where}: expected a list of true and false, found {values!r:.80}")
    return np.array(values, bool)
