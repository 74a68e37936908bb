"""The linear relaxation of the problem: convex hulls, the critical multiplier, and the lower bound.

For a multiplier m >= 0 (cost per byte) every feasible choice costs at least

    L(m) = sum over channels of min over options of (cost + m * size)  -  m * budget

and the largest L(m) is the value of the linear relaxation. It is reached at the slope of one edge
of one channel's lower convex hull of (size, cost) points, so that no iteration over m is needed:
the hulls' edges in order of falling slope are what the relaxation buys, and the edge at which the
budget runs out has the critical slope (Sinha and Zoltners, 1979; found by weighted selection as in
Dyer, 1984, and Zemel, 1984).
"""

import dataclasses

import numpy as np

from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray, blocks, pick
from qvla_jax.solvers.problem import AllocationProblem


@dataclasses.dataclass(frozen=True)
class Hulls:
    """The lower convex hull of every channel, as steps from its smallest option upwards.

    Attributes:
        first: i64[C], each channel's smallest option (the cheapest of them where several are
            equally small).
        option: i64[n - 1, C], the option that step t leads to; -1 beyond a channel's last step.
        size: i64[n - 1, C], the bytes that step t adds; 0 beyond the last.
        gain: f64[n - 1, C], the cost that step t saves per byte: positive, not rising with t; 0
            beyond the last.
    """

    first: IntArray
    option: IntArray
    size: IntArray
    gain: FloatArray

    def choice(self, levels: IntArray) -> IntArray:
        """i64[C], the options after the first `levels[c]` steps of each channel c."""
        if len(self.option) == 0:
            return self.first.copy()
        last = np.maximum(levels - 1, 0)
        reached = np.take_along_axis(self.option, last[None, :], axis=0)[0]
        return np.where(levels > 0, reached, self.first)


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The optimum of the linear relaxation.

    Attributes:
        budget: its budget.
        hulls: its convex hulls.
        multiplier: the critical slope, in cost per byte; 0 where the budget does not bind.
        lower_bound: the dual value there, reduced by the rounding errors of its own evaluation.
        levels: i64[C], the steps of each channel that are steeper than the multiplier; they fit the
            budget.
        prices: cost of a unit of each of the problem's resources, paid by every option before the
            hulls were formed; without them the bound ignores the resources' limits.
    """

    budget: int
    hulls: Hulls
    multiplier: float
    lower_bound: float
    levels: IntArray
    prices: tuple[float, ...] = ()


def relax(problem: AllocationProblem) -> Relaxation:
    """Solves the linear relaxation, in time linear in the number of options."""
    hulls = convex_hulls(problem)
    is_step = hulls.gain > 0
    capacity = problem.budget - int(pick(problem.sizes, hulls.first).sum())
    critical = critical_value(-hulls.gain[is_step], hulls.size[is_step], capacity)
    multiplier = 0.0 if critical is None else -critical
    return Relaxation(
        budget=problem.budget,
        hulls=hulls,
        multiplier=multiplier,
        lower_bound=dual_bound(problem, multiplier),
        levels=(hulls.gain > multiplier).sum(axis=0, dtype=np.int64),
    )


def take_ties(problem: AllocationProblem, relaxation: Relaxation) -> tuple[IntArray, int | None]:
    """Takes the steps exactly as steep as the multiplier, in order, until one does not fit.

    Returns:
        i64[C], the levels reached, and the channel whose step is the first that does not fit (None
        where all fit).
    """
    hulls = relaxation.hulls
    levels = relaxation.levels.copy()
    if relaxation.multiplier == 0:
        return levels, None
    # Step-major order: no channel's second step comes before its first.
    step, channel = np.nonzero(hulls.gain == relaxation.multiplier)
    slack = problem.budget - problem.size_of(hulls.choice(levels))
    total = np.cumsum(hulls.size[step, channel])
    count = int(np.searchsorted(total, slack, side="right"))
    np.add.at(levels, channel[:count], 1)
    return levels, int(channel[count]) if count < len(channel) else None


def convex_hulls(problem: AllocationProblem) -> Hulls:
    """Computes every channel's lower convex hull by gift wrapping, all channels at once.

    Options on an edge between two corners are kept as steps of their own: shorter steps waste less
    budget.
    """
    channels, options = problem.costs.shape
    first = np.empty(channels, dtype=np.int64)
    option = np.full((options - 1, channels), -1, dtype=np.int64)
    step_size = np.zeros((options - 1, channels), dtype=np.int64)
    step_gain = np.zeros((options - 1, channels), dtype=np.float64)
    for block in blocks(channels):
        costs, sizes = option_major(problem, block)
        here = np.zeros(costs.shape[1], dtype=np.int64)
        cost, size = costs[0].copy(), sizes[0].copy()
        for j in range(1, options):
            better = (sizes[j] < size) | ((sizes[j] == size) & (costs[j] < cost))
            _move(better, j, costs[j], sizes[j], here, cost, size)
        first[block] = here
        steepest = np.full(costs.shape[1], np.inf)
        for t in range(options - 1):
            there = np.full(costs.shape[1], -1, dtype=np.int64)
            gain = np.zeros(costs.shape[1])
            new_cost, new_size = cost.copy(), size.copy()
            for j in range(options):
                added = sizes[j] - size
                with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                    slope = (cost - costs[j]) / added
                # At equal slopes the nearer option is the shorter step of the same edge.
                # Of equally large options that rounding makes equally steep, the cheapest.
                nearer = (sizes[j] < new_size) | ((sizes[j] == new_size) & (costs[j] < new_cost))
                better = (slope > gain) | ((slope == gain) & nearer & (there >= 0))
                better &= added > 0
                np.copyto(gain, slope, where=better)
                _move(better, j, costs[j], sizes[j], there, new_cost, new_size)
            if not (there >= 0).any():
                break
            # Rounding must not make a later step look steeper than the one it depends on.
            np.minimum(gain, steepest, out=gain)
            steepest = gain
            option[t, block] = there
            step_size[t, block] = new_size - size
            step_gain[t, block] = gain
            cost, size = new_cost, new_size
    return Hulls(first=first, option=option, size=step_size, gain=step_gain)


def critical_value(keys: FloatArray, weights: IntArray, capacity: int) -> float | None:
    """The key at which items, taken in rising order of their keys, exceed a capacity.

    Args:
        keys: f64[i], finite.
        weights: i64[i], not negative.
        capacity: what the taken items may weigh.

    Returns:
        The key v for which the items below v weigh at most `capacity` and those up to v weigh more;
        None where all items fit.
    """
    if int(weights.sum()) <= capacity:
        return None
    while True:
        # The median of a sample: deterministic, and close enough to halve the rest.
        sample = keys[:: max(1, len(keys) // 1024)]
        pivot = np.partition(sample, len(sample) // 2)[len(sample) // 2]
        below = keys < pivot
        weight_below = int(weights[below].sum())
        if weight_below > capacity:
            keys, weights = keys[below], weights[below]
            continue
        capacity -= weight_below
        weight_equal = int(weights[keys == pivot].sum())
        if weight_equal > capacity:
            return float(pivot)
        capacity -= weight_equal
        above = keys > pivot
        keys, weights = keys[above], weights[above]


def dual_bound(problem: AllocationProblem, multiplier: float) -> float:
    """L(multiplier), evaluated on the options themselves and rounded down.

    The hulls are not used, so the value is a lower bound for any multiplier >= 0, whatever errors
    they may have.
    """
    eps = float(np.finfo(np.float64).eps)
    cost = magnitude = unsure = 0.0
    size = 0
    for block in blocks(problem.channels):
        costs, sizes = option_major(problem, block)
        best_cost, best_size = costs[0].copy(), sizes[0].copy()
        least = _penalized(costs[0], sizes[0], multiplier)
        lowest = np.full_like(least, np.inf)
        for j in range(len(costs)):
            value = _penalized(costs[j], sizes[j], multiplier)
            # A negative cost cancels against its bytes: such an option's exact value may be less
            # than that of the one chosen. (A closed option's is NaN, which fmin skips.)
            with np.errstate(invalid="ignore"):
                error = 4 * eps * (np.abs(costs[j]) + np.abs(value - costs[j]))
                lowest = np.fmin(lowest, value - error)
            better = value < least
            np.copyto(least, value, where=better)
            np.copyto(best_cost, costs[j], where=better)
            np.copyto(best_size, sizes[j], where=better)
        cost += float(best_cost.sum())
        magnitude += float(np.abs(best_cost).sum())
        size += int(best_size.sum())
        unsure += float((least - lowest).sum())
    # Sizes are exact, so only the costs and the choice of the minimum are rounded: a few units in
    # the last place of every term, and of the sum.
    unspent = multiplier * (size - problem.budget)
    slack = 8 * eps * (magnitude + multiplier * size + abs(unspent)) + unsure
    return cost + unspent - slack


def option_major(
    problem: AllocationProblem, rows: slice | IntArray
) -> tuple[FloatArray, FloatArray]:
    """Costs and sizes of some channels, each f64[n, rows]; closed options are infinite in both."""
    costs = np.ascontiguousarray(problem.costs[rows].T)
    sizes = np.ascontiguousarray(problem.sizes[rows].T, dtype=np.float64)
    if problem.allowed is not None:
        closed = ~problem.allowed[rows].T
        costs = np.where(closed, np.inf, costs)
        sizes = np.where(closed, np.inf, sizes)
    return costs, sizes


def _penalized(costs: FloatArray, sizes: FloatArray, multiplier: float) -> FloatArray:
    # 0 * inf is not a number: without a penalty a closed option's infinite cost alone excludes it.
    return costs + multiplier * sizes if multiplier > 0 else costs.copy()


def _move(
    where: BoolArray,
    option: int,
    costs: FloatArray,
    sizes: FloatArray,
    into_option: IntArray,
    into_cost: FloatArray,
    into_size: FloatArray,
) -> None:
    into_option[where] = option
    np.copyto(into_cost, costs, where=where)
    np.copyto(into_size, sizes, where=where)
