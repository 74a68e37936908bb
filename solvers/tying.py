"""Channels that must share an option: heads of q, k and v, gate and up rows, whole layers."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qvla_jax.errors import InputError, unknown
from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.resource import Resource


@dataclasses.dataclass(frozen=True, eq=False)
class Tied:
    """A problem whose channels stand for sets of tied channels of another one.

    Attributes:
        problem: one channel for each set; costs and sizes are the sums of its members'.
        member: i64[C], the channel of `problem` that stands for each original channel.
    """

    problem: AllocationProblem
    member: IntArray

    def expand(self, choice: IntArray) -> IntArray:
        """i64[C], a choice for `problem` as one for the original channels."""
        return choice[self.member]


def tie(problem: AllocationProblem, labels: IntArray) -> Tied:
    """Makes channels with the same label share their option.

    Any solver takes the result, and its bound holds for the tied problem. Its groups are the kinds
    of sets: those with equally many members in each of the original groups, so that multiples of
    channels become multiples of sets.

        tied = tie(problem, labels)
        choice = tied.expand(solve(tied.problem, "core").choice)

    Args:
        problem: the problem; `fixed` and `minimums` of any member bind its whole set.
        labels: i64[C], equal for tied channels.

    Raises:
        InputError: members are fixed to different options, or below the minimum of another, or a
            group with counts in multiples holds parts of unlike sets.
        BudgetError: the tied channels cannot meet the budget; the message states the least size.
    """
    given = np.asarray(labels)
    if given.shape != (problem.channels,):
        raise InputError(f"labels must have shape ({problem.channels},), got {given.shape}.")
    names, member = np.unique(given, return_inverse=True)
    member = member.astype(np.int64)
    shape = (len(names), problem.options)
    costs = np.zeros(shape)
    np.add.at(costs, member, problem.costs)
    sizes = _summed(problem.sizes, member, shape)
    resources = tuple(
        Resource(resource.name, _summed(resource.use, member, shape), resource.limit)
        for resource in problem.resources
    )

    kinds, shares = _kinds(problem, member)
    given_names = problem.group_names
    minimums = np.zeros(len(shares), dtype=np.int64)
    if problem.minimums is not None:
        minimums = np.array([problem.minimums[list(share)].max() for share in shares])
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
            groups=kinds,
            group_names=None
            if given_names is None
            else tuple("+".join(given_names[group] for group in share) for share in shares),
            fixed=fixed,
            minimums=minimums,
            multiples=_multiples(problem, shares),
            resources=resources,
        )
    except InputError as error:
        raise type(error)(f"With tied channels: {error}") from error
    return Tied(reduced, member)


def _kinds(
    problem: AllocationProblem, member: IntArray
) -> tuple[IntArray, tuple[dict[int, int], ...]]:
    """Each set's kind, and for each kind the members that a set of it has in each group."""
    group_of = problem.group_of
    groups = int(group_of.max()) + 1
    # One number for each pair, by set, then group; sorting pairs is far slower.
    keys, counts = np.unique(member * groups + group_of, return_counts=True)
    sets, parts = np.divmod(keys, groups)
    shares: list[list[tuple[int, int]]] = [[] for _ in range(int(member.max()) + 1)]
    entries: list[list[int]] = np.stack([sets, parts, counts], axis=1).tolist()
    for label, group, count in entries:
        shares[label].append((group, count))
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    kinds = [numbers.setdefault(tuple(share), len(numbers)) for share in shares]
    return np.array(kinds, dtype=np.int64), tuple(dict(share) for share in numbers)


def _multiples(problem: AllocationProblem, shares: Sequence[Mapping[int, int]]) -> IntArray | None:
    """i64[kinds, n], the multiples of sets that make whole tiles of channels in every group."""
    if problem.tiles is None:
        return None
    touched = collections.Counter(group for share in shares for group in share)
    for group, kinds in touched.items():
        if kinds > 1 and int(problem.tiles[group].max()) > 1:
            name = f" ({problem.group_names[group]})" if problem.group_names else ""
            raise InputError(
                f"Group {group}{name} holds parts of unlike sets of tied channels, so that its "
                "counts in multiples are no multiples of sets: give every set equally many of its "
                "channels, or split the group."
            )
    rows: list[IntArray] = []
    for share in shares:
        tiles, counts = problem.tiles[list(share)], np.array(list(share.values()))[:, None]
        rows.append(np.lcm.reduce(tiles // np.gcd(tiles, counts), axis=0))
    return np.stack(rows)


def paired_rows(problem: AllocationProblem, pairs: Sequence[Sequence[str]]) -> IntArray:
    """Labels that tie row i of one group to row i of others, such as gate and up projections.

    Args:
        problem: a problem with named groups.
        pairs: names of groups of equally many channels.

    Returns:
        i64[C], for `tie`; channels of other groups stay alone.

    Raises:
        InputError: a name is unknown, or the groups of a pair differ in size.
    """
    labels = np.arange(problem.channels, dtype=np.int64)
    for names in pairs:
        first, *others = (_rows(problem, name) for name in names)
        for name, rows in zip(names[1:], others, strict=True):
            if len(rows) != len(first):
                raise InputError(
                    f"Groups {names[0]} and {name} cannot be tied row by row: they have "
                    f"{len(first)} and {len(rows)} channels."
                )
            labels[rows] = labels[first]
    return labels


def row_blocks(problem: AllocationProblem, names: Sequence[str], block: int) -> IntArray:
    """Labels that tie each run of `block` channels of some groups, such as attention heads.

    Args:
        problem: a problem with named groups.
        names: the groups.
        block: channels of a run: the width of a head.

    Returns:
        i64[C], for `tie`; channels of other groups stay alone.

    Raises:
        InputError: a name is unknown, or a group is not whole blocks.
    """
    labels = np.arange(problem.channels, dtype=np.int64)
    for name in names:
        rows = _rows(problem, name)
        if block < 1 or len(rows) % block:
            raise InputError(
                f"Group {name} of {len(rows)} channels is not whole blocks of {block}."
            )
        labels[rows] = np.repeat(rows[::block], block)
    return labels


def _rows(problem: AllocationProblem, name: str) -> IntArray:
    names = problem.group_names or ()
    if name not in names or problem.groups is None:
        raise InputError(unknown("group", name, names))
    return np.flatnonzero(problem.groups == names.index(name))


def _summed(table: IntArray, member: IntArray, shape: tuple[int, int]) -> IntArray:
    total = np.zeros(shape, dtype=np.int64)
    np.add.at(total, member, table)
    return total
