"""Channels that must share an option: heads of q, k and v, gate and up rows, whole layers."""

import dataclasses

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.problem import AllocationProblem


@dataclasses.dataclass(frozen=True, eq=False)
class Tied:
    """A problem whose channels stand for sets of tied channels of another one.

    Attributes:
        problem: One channel for each set; costs and sizes are the sums of its members'.
        member: i64[C], the channel of `problem` that stands for each original channel.
    """

    problem: AllocationProblem
    member: IntArray

    def expand(self, choice: IntArray) -> IntArray:
        """i64[C], a choice for `problem` as one for the original channels."""
        return choice[self.member]


def tie(problem: AllocationProblem, labels: IntArray) -> Tied:
    """Makes channels with the same label share their option.

    Any solver takes the result, and its bound is one for the tied problem:

        tied = tie(problem, labels)
        choice = tied.expand(solve(tied.problem, "core").choice)

    Args:
        problem: The problem; `fixed` and `minimums` of any member bind its whole set.
        labels: i64[C], equal for tied channels.

    Raises:
        InputError: Members are fixed to different options, or below the minimum of another.
        BudgetError: The tied channels cannot meet the budget; the message states the least size.
    """
    given = np.asarray(labels)
    if given.shape != (problem.channels,):
        raise InputError(f"labels must have shape ({problem.channels},), got {given.shape}.")
    names, member = np.unique(given, return_inverse=True)
    member = member.astype(np.int64)
    shape = (len(names), problem.options)
    costs, sizes = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    np.add.at(costs, member, problem.costs)
    np.add.at(sizes, member, problem.sizes)

    minimums = np.zeros(len(names), dtype=np.int64)
    if problem.minimums is not None and problem.groups is not None:
        np.maximum.at(minimums, member, problem.minimums[problem.groups])
    fixed = np.full(len(names), -1, dtype=np.int64)
    if problem.fixed is not None:
        np.maximum.at(fixed, member, problem.fixed)
        torn = np.flatnonzero((problem.fixed >= 0) & (problem.fixed != fixed[member]))
        if len(torn):
            channel = int(torn[0])
            raise InputError(
                f"{problem.channel_name(channel)} is fixed to option "
                f"{int(problem.fixed[channel])}, and a channel tied to it to option "
                f"{int(fixed[member[channel]])}."
            )
    try:
        reduced = AllocationProblem(
            costs=costs,
            sizes=sizes,
            budget=problem.budget,
            groups=np.arange(len(names)),
            group_names=tuple(f"label {name}" for name in names.tolist()),
            fixed=fixed,
            minimums=minimums,
        )
    except InputError as error:
        raise type(error)(f"With tied channels: {error}") from error
    return Tied(reduced, member)
