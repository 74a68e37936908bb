"""Channel counts in whole tiles.

Kernels work on tiles of channels of one bit-width: 16 on a CPU, 64 on a GPU, 128 on a TPU. A count
that is not a multiple of the tile must be padded, with uncounted bytes or with channels promoted
after the fact. Here the counts are part of the allocation.
"""

import numpy as np

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray
from qvla_jax.solvers.marginal import marginal_from
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import relax


@register("greedy:aligned", handles=("multiples",))
def greedy_aligned(problem: AllocationProblem, *, iterations: int = 40) -> Proposal:
    """Counts per group and option in the problem's multiples; the price is reported.

    At a multiplier every group takes its cheapest options and then rounds each count up or down,
    whichever costs less, by moving the channels for which that costs least. The multiplier is
    bisected until the bytes fit. The multiples hold exactly; the cost is not proven optimal under
    them.

    Options whose multiple is 1 take the remainder: usually pruned rows, which are not stored, and
    the widest option. Without such options, every group must be whole tiles.

    Args:
        problem: the problem; without groups all channels form one.
        iterations: bisection steps.

    Raises:
        InputError: a setting is wrong, or a group cannot be aligned (for its fixed channels, or
            because its size is no whole number of tiles).
        BudgetError: no aligned allocation was found within the budget.
    """
    if iterations < 1:
        raise InputError(f"iterations must be positive, got {iterations}.")
    relaxation = relax(problem)
    groups = _Groups(problem)

    best: tuple[float, IntArray] | None = None
    # Bracket the multiplier around the relaxation's, in growing strides, then bisect.
    low, high = 0.0, np.inf
    trial, stride = relaxation.multiplier, 1.05
    for _ in range(iterations):
        choice = groups.aligned(trial)
        cost, fits = problem.cost_of(choice), problem.size_of(choice) <= problem.budget
        if fits and (best is None or cost < best[0]):
            best = cost, choice
        low, high = (low, trial) if fits else (trial, high)
        stride = min(stride * stride, 16.0)
        if not fits and high == np.inf:
            trial = trial * stride if trial > 0 else _gentlest(relaxation.hulls.gain)
        elif fits and low == 0:
            trial /= stride
        else:
            trial = (low + high) / 2
        if trial in (low, high) or high - low <= 1e-9 * low:
            break
    if best is None:
        choice = groups.smallest()
        size = problem.size_of(choice)
        if size > problem.budget:
            raise BudgetError(
                f"The budget of {problem.budget:,} bytes is too small for counts in multiples of "
                f"the tiles: the smallest such allocation found takes {size} bytes."
            )
        best = problem.cost_of(choice), choice
    details = price_of_tiles(problem, best[1], marginal_from(problem, relaxation).choice)
    return Proposal(best[1], relaxation=relaxation, details=details)


def price_of_tiles(
    problem: AllocationProblem, choice: IntArray, unaligned: IntArray
) -> dict[str, float]:
    """What whole tiles cost relative to a good choice without them, for a solution's details."""
    cost = problem.cost_of(unaligned)
    return {"unaligned_cost": cost, "price": problem.cost_of(choice) - cost}


def _gentlest(gains: FloatArray) -> float:
    """The least positive gain: the first multiplier at which anything changes."""
    positive = gains[gains > 0]
    return float(positive.min()) if len(positive) else 1.0


class _Groups:
    """The problem's arrays with each group's channels side by side."""

    def __init__(self, problem: AllocationProblem):
        groups = problem.group_of
        self._order = np.argsort(groups, kind="stable")
        self._labels, starts = np.unique(groups[self._order], return_index=True)
        self._ends = np.append(starts, problem.channels)
        self._costs = problem.costs[self._order]
        self._sizes = problem.sizes[self._order]
        self._allowed = None if problem.allowed is None else problem.allowed[self._order]
        self._names = problem.group_names
        self._tiles = problem.tiles

    def aligned(self, multiplier: float) -> IntArray:
        """i64[C], the aligned choice at a multiplier."""
        return self._choice(1.0, multiplier)

    def smallest(self) -> IntArray:
        """i64[C], the aligned choice that minimizes only the bytes."""
        return self._choice(0.0, 1.0)

    def _choice(self, cost_weight: float, size_weight: float) -> IntArray:
        choice = np.empty(len(self._order), dtype=np.int64)
        for label, start, end in zip(self._labels, self._ends[:-1], self._ends[1:], strict=True):
            rows = slice(int(start), int(end))
            values = cost_weight * self._costs[rows] + size_weight * self._sizes[rows]
            if self._allowed is not None:
                values = np.where(self._allowed[rows], values, np.inf)
            if self._tiles is None:
                choice[self._order[rows]] = values.argmin(axis=1)
                continue
            aligned = _align(values, self._tiles[label])
            if aligned is None:
                name = f" ({self._names[label]})" if self._names is not None else ""
                raise InputError(
                    f"Group {int(label)}{name} of {rows.stop - rows.start} channels cannot have "
                    f"counts in multiples of {self._tiles[label].tolist()}: let another option "
                    f"have any count (1), or free its fixed channels."
                )
            choice[self._order[rows]] = aligned
        return choice


def _align(values: FloatArray, multiples: IntArray) -> IntArray | None:
    """Rounds the counts of one group's options, one option after the other.

    Channels move between options that are not rounded yet or are free, so a rounded count stays. If
    no option is free, the last one gets the rest, which must be whole tiles.

    Args:
        values: f64[c, n], penalized costs; infinite for closed options.
        multiples: i64[n], the tile of each option.

    Returns:
        i64[c], or None if that fails.
    """
    tiled = np.flatnonzero(multiples > 1)
    if len(tiled) == len(multiples):
        tiled = tiled[:-1]
    rows = np.arange(len(values))
    choice = values.argmin(axis=1)
    unrounded = np.ones(values.shape[1], dtype=np.int64)
    for option in tiled.tolist():
        unrounded[option] = 0
        members = choice == option
        multiple = int(multiples[option])
        over = int(members.sum()) % multiple
        if over == 0:
            continue
        elsewhere = np.where(unrounded == 1, values, np.inf)
        target = elsewhere.argmin(axis=1)
        with np.errstate(invalid="ignore"):  # closed options of channels that are not members
            leave = np.where(members, elsewhere[rows, target] - values[:, option], np.inf)
        enter = np.where(unrounded[choice] == 1, values[:, option] - values[rows, choice], np.inf)
        out, loss_out = _least(leave, over)
        into, loss_in = _least(enter, multiple - over)
        if min(loss_out, loss_in) == np.inf:
            return None
        if loss_out <= loss_in:
            choice[out] = target[out]
        else:
            choice[into] = option
    counts = np.bincount(choice, minlength=len(multiples))
    return None if bool((counts % multiples).any()) else choice


def _least(losses: FloatArray, count: int) -> tuple[IntArray, float]:
    """The `count` channels of smallest loss, and their total loss; infinite if too few."""
    if count > len(losses):
        return np.empty(0, dtype=np.int64), np.inf
    chosen = np.argpartition(losses, count - 1)[:count]
    return chosen, float(losses[chosen].sum())
