"""Between metric units and the normalized space that the policies work in.

OpenVLA's `BOUNDS_Q99`: quantiles q01 and q99 map to -1 and 1, values outside are clipped, entries
whose mask is False (the gripper) pass unchanged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qvla_jax.array_typing import Bool, Float
from qvla_jax.errors import CheckpointError

# As in OpenVLA-OFT: keeps entries without spread finite.
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Normalizes the last axis of actions or proprio."""

    q01: Float[np.ndarray, " a"]
    q99: Float[np.ndarray, " a"]
    mask: Bool[np.ndarray, " a"]

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Any], *, where: str) -> "Normalizer":
        """From one block (`action` or `proprio`) of a public dataset_statistics.json.

        Raises:
            CheckpointError: a key is missing, lengths differ, or a value is not finite.
        """
        try:
            q01 = np.asarray(statistics["q01"], np.float64)
            q99 = np.asarray(statistics["q99"], np.float64)
            mask = np.asarray(statistics.get("mask", np.ones(q01.shape, bool)), bool)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: expected lists 'q01' and 'q99' ({error!r})") from error
        if not (q01.ndim == 1 and q01.shape == q99.shape == mask.shape):
            raise CheckpointError(
                f"{where}: q01, q99 and mask have shapes {q01.shape}, {q99.shape}, {mask.shape}; "
                "they must be equally long lists"
            )
        if not (np.isfinite(q01).all() and np.isfinite(q99).all()):
            raise CheckpointError(f"{where}: q01 or q99 holds NaN or inf")
        return cls(q01=q01, q99=q99, mask=mask)

    @property
    def units(self) -> Float[np.ndarray, " a"]:
        """Metric units in one unit of the normalized space."""
        return np.where(self.mask, 0.5 * (self.q99 - self.q01 + _EPSILON), 1.0)

    def normalize(self, values: Float[np.ndarray, "... a"]) -> Float[np.ndarray, "... a"]:
        """Metric units -> [-1, 1], float32."""
        scaled = 2.0 * (values - self.q01) / (self.q99 - self.q01 + _EPSILON) - 1.0
        return np.where(self.mask, np.clip(scaled, -1.0, 1.0), values).astype(np.float32)

    def unnormalize(self, values: Float[np.ndarray, "... a"]) -> Float[np.ndarray, "... a"]:
        """[-1, 1] -> metric units, float32."""
        scaled = (values + 1.0) * self.units + self.q01
        return np.where(self.mask, scaled, values).astype(np.float32)
