"""Budgets other than bytes: BitOps, predicted latency, the number of pruned channels."""

import dataclasses

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import IntArray, frozen, pick


@dataclasses.dataclass(frozen=True, eq=False)
class Resource:
    """The use of something other than bytes by the options, and its limit.

    Whole numbers, in any unit (BitOps, nanoseconds, channels), so that sums are exact.

    Args:
        name: used in messages and reports.
        use: i64[C, n], not negative.
        limit: what all channels together may use.

    Raises:
        InputError: `use` is not a table of whole numbers, or one is negative.
    """

    name: str
    use: IntArray
    limit: int

    def __post_init__(self) -> None:
        use = np.asarray(self.use)
        if use.ndim != 2 or not np.issubdtype(use.dtype, np.integer):
            raise InputError(
                f"resource {self.name!r}: use must be a table [channels, options] of integers, got "
                f"{use.dtype}{list(use.shape)}; round it in a smaller unit."
            )
        if int(use.min(initial=0)) < 0:
            channel, option = (int(i) for i in np.argwhere(use < 0)[0])
            raise InputError(
                f"resource {self.name!r}: channel {channel}, option {option} uses "
                f"{use[channel, option]}; a use must not be negative."
            )
        if float(use.max(axis=1, initial=0).astype(np.float64).sum()) > 2**53:
            raise InputError(
                f"resource {self.name!r} adds up to more than 2**53; use larger units."
            )
        object.__setattr__(self, "use", frozen(np.ascontiguousarray(use, dtype=np.int64)))
        object.__setattr__(self, "limit", int(self.limit))

    def used_by(self, choice: IntArray) -> int:
        """The summed use of a choice i64[C]."""
        return int(pick(self.use, choice).sum())


def count_of(
    option: int, shape: tuple[int, int], *, least: int | None = None, most: int | None = None
) -> tuple[Resource, ...]:
    """Bounds the number of channels that take an option, such as a share of pruned channels.

    Args:
        option: 0 .. n-1.
        shape: (C, n) of the problem.
        least: minimum number of channels that take it.
        most: maximum number of channels that take it; equal to `least` for a fixed number.

    Returns:
        A resource for each given bound, for a problem's `resources`.

    Raises:
        InputError: the option or a number lies outside the problem.
    """
    channels, options = shape
    if not 0 <= option < options:
        raise InputError(f"option must be 0 .. {options - 1}, got {option}.")
    for bound in (least, most):
        if bound is not None and not 0 <= bound <= channels:
            raise InputError(f"a number of channels must be 0 .. {channels}, got {bound}.")
    takes = np.zeros(shape, dtype=np.int64)
    takes[:, option] = 1
    found: list[Resource] = []
    if most is not None:
        found.append(Resource(f"channels at option {option}", takes, most))
    if least is not None:
        found.append(Resource(f"channels not at option {option}", 1 - takes, channels - least))
    return tuple(found)
