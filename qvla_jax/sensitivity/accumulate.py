"""Means over frames, with their standard errors, in a fixed order of summation."""

from collections.abc import Iterable

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError


class FrameMean:
    """Running mean over frames of arrays of one shape, in float64 on the host.

    Frames are added one after another in the calibration set's order, so that neither the batch
    size nor the number of devices changes the order of summation.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._sum: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())

    def add(self, values: Float[np.ndarray, "b ..."]) -> None:
        """Adds one value for each frame.

        Raises:
            InputError: a value is NaN or infinite.
        """
        check_finite(values, first=self.frames)
        for value in values.astype(np.float64):
            self._sum = self._sum + value
            self._squares = self._squares + value * value
            self.frames += 1

    @property
    def mean(self) -> Float[np.ndarray, "..."]:
        """Mean over the frames added so far."""
        return self._sum / self.frames

    @property
    def standard_error(self) -> Float[np.ndarray, "..."]:
        """Standard error of the mean; zero if there is only one frame."""
        if self.frames < 2:
            return np.zeros_like(self._sum)
        variance = np.maximum(self._squares / self.frames - self.mean**2, 0.0)
        return np.sqrt(variance / (self.frames - 1))


def mean_over_frames(
    batches: Iterable[Float[np.ndarray, "b ..."]],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The mean over the frames of all batches, and its standard error, float64.

    Raises:
        InputError: a value is NaN or infinite.
    """
    result = FrameMean()
    for values in batches:
        result.add(values)
    return result.mean, result.standard_error


def check_finite(values: Float[np.ndarray, "b ..."], *, first: int) -> None:
    """Refuses values that are not finite.

    Args:
        values: one for each frame.
        first: number of the first frame in the calibration set.

    Raises:
        InputError: a value is NaN or infinite; the message names the frame.
    """
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise InputError(
            f"calibration frame {first + int(np.flatnonzero(~finite)[0])}: the forward or backward "
            "pass gave NaN or infinite values; check the policy's weights and the observation"
        )
