"""QVLA's greedy rules: start from the largest options, step down until the budget holds.

Both walk each channel's options from the largest to the smallest and repeatedly demote the channel
whose next step has the least key. The paper's key is the *rise* of the cost per byte saved (Xu et
al., "QVLA: Not All Channels Are Equal in Vision-Language-Action Model's Quantization", ICLR 2026,
arXiv:2602.03782). The released code divides the *absolute* cost at the new option by the bits
saved, whatever the channel's fan-in. Neither looks beyond the next step, nor fills the slack that
the last demotion leaves.

A heap would pop one step at a time. Here the pop order is computed: a step whose key is below an
earlier key of its channel is popped directly after that earlier step, so that the steps come in the
order of the running maximum of their channel's keys, and the budget is met at one critical value of
it.
"""

import dataclasses

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import critical_value

_UNITS = ("byte", "channel")


@register("greedy:qvla")
def greedy_qvla(problem: AllocationProblem, *, unit: str = "byte") -> Proposal:
    """The paper's demotion rule: least rise of the cost per unit saved goes first.

    Args:
        problem: the problem.
        unit: "byte" divides by the bytes saved; "channel" by the share of the channel's own bytes
            saved (bits, whatever the fan-in).
    """
    walk = _walk(problem)
    return _demote(problem, walk, np.diff(walk.cost, axis=0) / _savings(walk, unit))


@register("greedy:released")
def greedy_released(problem: AllocationProblem, *, unit: str = "channel") -> Proposal:
    """The released code's demotion rule: least absolute cost at the new option per unit saved.

    With sizes in bits and one for all channels (the release averages over channels, not weights)
    this repeats the release step for step, ties included. With sizes in bytes it shows what the
    rule is worth under a real budget.

    Args:
        problem: the problem.
        unit: as in `greedy:qvla`.
    """
    walk = _walk(problem)
    return _demote(problem, walk, walk.cost[1:] / _savings(walk, unit))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Each channel's allowed options from the largest to the smallest, equally large ones merged.

    Attributes:
        option: i64[n, C]; where a channel has fewer options, its last one is repeated.
        cost: f64[n, C], likewise.
        size: i64[n, C], likewise: a step that saves nothing is no step.
    """

    option: IntArray
    cost: FloatArray
    size: IntArray


def _walk(problem: AllocationProblem) -> _Walk:
    sizes, costs = problem.sizes, problem.costs
    ascending = bool((sizes[:, 1:] > sizes[:, :-1]).all())
    if ascending and problem.allowed is None:
        option = np.broadcast_to(np.arange(problem.options)[::-1, None], sizes.T.shape)
        return _Walk(
            option, np.ascontiguousarray(costs.T[::-1]), np.ascontiguousarray(sizes.T[::-1])
        )
    if problem.allowed is not None:
        sizes = np.where(problem.allowed, sizes, -1)
    # By falling size; among equal sizes the cheapest last, so that it is the one that stays.
    order = np.lexsort((costs, -sizes), axis=1)[:, ::1]
    size = np.take_along_axis(sizes, order, axis=1)
    keep = np.ones(order.shape, dtype=np.bool_)
    keep[:, 1:] = size[:, 1:] != size[:, :-1]
    keep &= size >= 0
    # Kept options first, in order; then the last kept one repeated.
    position = np.argsort(~keep, axis=1, kind="stable")
    last = keep.sum(axis=1, keepdims=True) - 1
    position = np.take_along_axis(
        position, np.minimum(np.arange(problem.options)[None, :], last), axis=1
    )
    option = np.take_along_axis(order, position, axis=1)
    return _Walk(
        option=np.ascontiguousarray(option.T),
        cost=np.ascontiguousarray(np.take_along_axis(costs, option, axis=1).T),
        size=np.ascontiguousarray(np.take_along_axis(problem.sizes, option, axis=1).T),
    )


def _savings(walk: _Walk, unit: str) -> FloatArray:
    """f64[n - 1, C], what each step saves; infinite where there is no step."""
    if unit not in _UNITS:
        raise InputError(f"unit must be one of {', '.join(_UNITS)}, got {unit!r}.")
    saved = -np.diff(walk.size, axis=0)
    scale = 1 if unit == "byte" else np.maximum(walk.size[0] - walk.size[-1], 1)
    return np.where(saved > 0, saved / scale, np.inf)


def _demote(problem: AllocationProblem, walk: _Walk, keys: FloatArray) -> Proposal:
    """Pops steps by rising key until the budget holds.

    Args:
        problem: the problem.
        walk: the options in order.
        keys: f64[n - 1, C], the key of each step.
    """
    saved = -np.diff(walk.size, axis=0)
    is_step = saved > 0
    record = np.maximum.accumulate(keys, axis=0)
    excess = int(walk.size[0].sum()) - problem.budget
    levels = np.zeros(problem.channels, dtype=np.int64)
    if excess > 0:
        # The steps below the critical key save less than the excess, with its ties they save
        # enough.
        critical = critical_value(record[is_step], saved[is_step], excess - 1)
        if critical is None:
            critical = np.inf
        before = is_step & (record < critical)
        levels = before.sum(axis=0, dtype=np.int64)
        step, channel = np.nonzero(is_step & (record == critical))
        order = _pop_order(keys, record, step, channel)
        step, channel = step[order], channel[order]
        total = np.cumsum(saved[step, channel])
        count = int(np.searchsorted(total, excess - int(saved[before].sum()), side="left")) + 1
        np.add.at(levels, channel[:count], 1)
    choice = np.take_along_axis(walk.option, levels[None, :], axis=0)[0]
    return Proposal(choice.astype(np.int64))


def _pop_order(keys: FloatArray, record: FloatArray, step: IntArray, channel: IntArray) -> IntArray:
    """The order in which a heap pops steps of one running maximum, the earliest push first.

    A channel's steps form runs: one starts at each step whose key is at least the running maximum
    before it, and pops as a block. At the start the first step of every channel is pushed, in
    channel order; a later run is pushed when the run before it pops. So runs are ordered by their
    maximum, then by the maxima of the runs before them, latest first (none at all ranks first),
    then by channel.
    """
    keys, record = keys[:, channel], record[:, channel]
    previous = np.full((len(keys), len(channel)), -np.inf)
    for t in range(1, len(keys)):
        starts = (keys[t] >= record[t - 1]) & (t <= step)
        shifted = np.vstack([record[t - 1], previous[:-1]])
        previous = np.where(starts, shifted, previous)
    return np.lexsort((step, channel, *previous[::-1]))
