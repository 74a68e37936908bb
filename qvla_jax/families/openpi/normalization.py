"""Between a robot's units and the normalized space of pi0 and pi0.5.

By mean and deviation or by quantiles, never clipped, in float64. Statistics may be longer than the
values (their padding is cut) and, on the way back, shorter: what they say nothing of passes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np

from qvla_jax.array_typing import Float, Float64
from qvla_jax.errors import CheckpointError

_EPSILON: Final = 1e-6
_BLOCKS: Final = ("state", "actions")


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """An affine map of the last axis: normalized = (values - offset) / scale - shift."""

    offset: Float64[np.ndarray, " a"]
    scale: Float64[np.ndarray, " a"]
    # 1 where quantiles map to -1 and 1.
    shift: float

    def normalize(self, values: Float[np.ndarray, "... a"]) -> Float64[np.ndarray, "... a"]:
        """The robot's units -> the normalized space."""
        size = values.shape[-1]
        return (values - self.offset[:size]) / self.scale[:size] - self.shift

    def unnormalize(self, values: Float[np.ndarray, "... a"]) -> Float64[np.ndarray, "... a"]:
        """The normalized space -> the robot's units; entries beyond the statistics pass."""
        size = min(values.shape[-1], len(self.offset))
        known, rest = values[..., :size].astype(np.float64), values[..., size:]
        known = (known + self.shift) * self.scale[:size] + self.offset[:size]
        return np.concatenate([known, rest.astype(np.float64)], axis=-1)


def read_normalizers(
    statistics: Mapping[str, Any], kind: Literal["zscore", "quantile"], *, where: str
) -> dict[str, Normalizer]:
    """Normalizers of `state` and `actions` from the content of a public norm_stats.json.

    Raises:
        CheckpointError: a key is missing, lengths differ, or a value is not finite.
    """
    keys = ("mean", "std") if kind == "zscore" else ("q01", "q99")
    found = {}
    for block in _BLOCKS:
        place = f"{where}: norm_stats.{block}"
        try:
            entry = statistics["norm_stats"][block]
            first, second = (np.asarray(entry[key], np.float64) for key in keys)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{place}: expected lists {keys[0]!r} and {keys[1]!r} ({error!r})"
            ) from error
        if first.ndim != 1 or first.shape != second.shape:
            raise CheckpointError(
                f"{place}: {keys[0]} and {keys[1]} have shapes {first.shape} and {second.shape}; "
                "they must be equally long lists"
            )
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise CheckpointError(f"{place}: {keys[0]} or {keys[1]} holds NaN or inf")
        if kind == "zscore":
            found[block] = Normalizer(offset=first, scale=second + _EPSILON, shift=0.0)
        else:
            half = (second - first + _EPSILON) / 2.0
            found[block] = Normalizer(offset=first, scale=half, shift=1.0)
    return found
