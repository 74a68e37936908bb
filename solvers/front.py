"""The whole trade-off between cost and bytes from one sort."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from qvla_jax.array_files import write_arrays
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray, pick
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.relaxation import Hulls, convex_hulls


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """Near-optimal allocations for many budgets; point i belongs to `budgets[i]`.

    A point takes the steepest hull steps that fit its budget: it is optimal for the bytes that it
    uses, and leaves less than one step's bytes unspent. (`solve` with that budget spends them.)

    Attributes:
        budgets: i64[q], bytes.
        cost: f64[q], summed costs.
        size: i64[q], summed bytes, at most the budgets.
        lower_bound: f64[q], no allocation within the budget costs less.
        multiplier: f64[q], the slope of the front there, in cost per byte.
    """

    budgets: IntArray
    cost: FloatArray
    size: IntArray
    lower_bound: FloatArray
    multiplier: FloatArray
    _hulls: Hulls
    _steps: IntArray
    _order: IntArray
    _counts: IntArray

    def choice(self, point: int) -> IntArray:
        """i64[C], the options at a point."""
        channels = len(self._hulls.first)
        taken = self._steps[self._order[: int(self._counts[point])]] % channels
        levels = np.bincount(taken, minlength=channels).astype(np.int64)
        return self._hulls.choice(levels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the figures of all points to a `.safetensors` or `.npz` file."""
        names = ("budgets", "cost", "size", "lower_bound", "multiplier")
        arrays = {name: getattr(self, name) for name in names}
        write_arrays(path, arrays, {}, kind="qvla_jax.allocation_front")


def sweep(problem: AllocationProblem, budgets: Sequence[int] | int = 100) -> Front:
    """Solves the relaxation for many budgets at once; the problem's own budget plays no part.

    Args:
        problem: the problem.
        budgets: bytes, in any order; or how many, evenly spaced from the least to the largest size.

    Raises:
        BudgetError: a budget is below the least size; the message states it.
        InputError: there is no budget.
    """
    least = problem.minimum_size
    if isinstance(budgets, int):
        given = np.linspace(least, problem.maximum_size, budgets).astype(np.int64)
    else:
        given = np.asarray(budgets, dtype=np.int64)
    if given.ndim != 1 or len(given) == 0:
        raise InputError("sweep needs at least one budget.")
    if int(given.min()) < least:
        raise BudgetError(
            f"The budget of {int(given.min()):,} bytes cannot be met: the smallest allowed options "
            f"take {least} bytes. Raise it to at least that."
        )

    hulls = convex_hulls(problem)
    steps = np.flatnonzero(hulls.gain > 0)
    gain, size = hulls.gain.ravel()[steps], hulls.size.ravel()[steps]
    order, gain_in_order = _falling(gain)
    # Entry i is the state before step i.
    size_in_order = size[order]
    sizes = np.concatenate([[0], np.cumsum(size_in_order)]) + problem.size_of(hulls.first)
    multipliers = np.concatenate([gain_in_order, [0.0]])
    counts = np.searchsorted(sizes, given, side="right") - 1
    used, multiplier = sizes[counts], multipliers[counts]

    # Costs are summed from the cheap end, where they are small, over the stretches between points.
    saved = gain_in_order * size_in_order
    starts = np.unique(counts)
    stretches = [float(part.sum()) for part in np.split(saved, starts)[1:]]
    above = np.cumsum(stretches[::-1])[::-1][np.searchsorted(starts, counts)]
    everything = hulls.choice((hulls.gain > 0).sum(axis=0, dtype=np.int64))
    cost = problem.cost_of(everything) + above
    # Rounding: a few units in the last place of the summed magnitudes.
    magnitude = above + float(np.abs(pick(problem.costs, everything)).sum())
    slack = 32 * np.finfo(np.float64).eps * (magnitude + multiplier * given)
    lower_bound = cost - multiplier * (given - used) - slack
    return Front(
        given,
        cost,
        used,
        lower_bound,
        multiplier,
        hulls,
        _steps=steps,
        _order=order,
        _counts=counts,
    )


def _falling(gain: FloatArray) -> tuple[IntArray, FloatArray]:
    """Order of falling gain, and the gains in it.

    Equal gains keep the order given, so that no channel's second step precedes its first.
    """
    order = np.argsort(-gain)
    ordered = -np.sort(-gain)
    same = ordered[1:] == ordered[:-1]
    tied = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))
    members = order[tied]
    order[tied] = members[np.lexsort((members, -gain[members]))]
    return order, ordered
