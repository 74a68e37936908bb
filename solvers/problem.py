"""The allocation problem: one option for each channel, least cost, within a budget of bytes."""

import dataclasses
import functools
import operator
import os
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

from qvla_jax.array_files import read_arrays, write_arrays
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray, frozen, pick
from qvla_jax.solvers.resource import Resource

_FORMAT = "qvla_jax.allocation_problem"
_OPTIONAL = ("groups", "fixed", "minimums", "multiples")
# Sums of sizes stay exact in int64, and exact in float64 where they meet a multiplier.
_LARGEST_TOTAL = 2**53


@dataclasses.dataclass(frozen=True, eq=False)
class AllocationProblem:
    """A multiple-choice knapsack: choose one option for each channel.

    Minimize `sum(costs[c, choice[c]])` subject to `sum(sizes[c, choice[c]]) <= budget` and to the
    constraints below. Costs may be negative, zero, tied, or rise with the size (`summary()` counts
    such channels); options need no order. The arrays are read-only views after construction.

    Args:
        costs: f64[C, n], any unit; finite.
        sizes: i64[C, n], bytes actually stored; integers, not negative.
        budget: bytes that all channels together may take.
        groups: i64[C], the module (0 .. G-1) that each channel belongs to.
        group_names: G names, used in messages and by reports.
        fixed: i64[C], the option that a channel must take, or -1 where it is free.
        minimums: i64[G], the smallest option *index* open to the channels of each group.
        multiples: i64[n] or i64[G, n], the tile of each option, in all groups or in each: the
            number of channels of a group that take an option must be a multiple of its tile; 1
            leaves it free.
        resources: budgets other than bytes.

    Raises:
        InputError: an array has the wrong shape or type, a value is not finite or negative (the
            message names the channel), or `fixed` contradicts `minimums`.
        BudgetError: even the smallest allowed options exceed the budget, or the most economical
            ones exceed a resource's limit; the message states what they take.
    """

    costs: FloatArray
    sizes: IntArray
    budget: int
    groups: IntArray | None = None
    group_names: tuple[str, ...] | None = None
    fixed: IntArray | None = None
    minimums: IntArray | None = None
    multiples: IntArray | None = None
    resources: tuple[Resource, ...] = ()

    def __post_init__(self) -> None:
        set_field = functools.partial(object.__setattr__, self)
        costs = _as_floats(self.costs)
        sizes = _as_integers(self.sizes, "sizes", (costs.shape[0], costs.shape[1]))
        set_field("costs", costs)
        set_field("sizes", sizes)
        set_field("budget", _as_budget(self.budget))
        if self.groups is not None:
            set_field("groups", _as_integers(self.groups, "groups", (self.channels,)))
        if self.group_names is not None:
            set_field("group_names", tuple(self.group_names))
        self._check_groups()
        if self.fixed is not None:
            set_field("fixed", _as_integers(self.fixed, "fixed", (self.channels,)))
        if self.minimums is not None:
            set_field("minimums", _as_integers(self.minimums, "minimums", (self.group_count,)))
        if self.multiples is not None:
            shape = (max(1, self.group_count), self.options)
            shape = shape if np.ndim(self.multiples) == 2 else shape[1:]
            set_field("multiples", _as_integers(self.multiples, "multiples", shape))
        set_field("resources", tuple(self.resources))
        self._check_values()
        self._check_constraints()
        if self.minimum_size > self.budget:
            raise BudgetError(
                f"The budget of {self.budget:,} bytes cannot be met: the smallest allowed options "
                f"of the {self.channels:,} channels take {self.minimum_size:,} bytes. Raise the "
                f"budget to at least {self.minimum_size} bytes"
                + ("" if self.allowed is None else ", or relax `fixed` and `minimums`")
                + "."
            )
        for resource in self.resources:
            least = int(self._masked(resource.use, np.iinfo(np.int64).max).min(axis=1).sum())
            if least > resource.limit:
                raise BudgetError(
                    f"The limit of {resource.limit:,} on {resource.name} cannot be met: the "
                    f"thriftiest allowed options use {least:,}. Raise it to at least {least}."
                )

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return int(self.costs.shape[0])

    @property
    def options(self) -> int:
        """The number of options for each channel, n."""
        return int(self.costs.shape[1])

    @property
    def group_count(self) -> int:
        """The number of groups, G; 0 without groups."""
        if self.group_names is not None:
            return len(self.group_names)
        return 0 if self.groups is None else int(self.groups.max()) + 1

    @functools.cached_property
    def allowed(self) -> BoolArray | None:
        """bool[C, n], which options are open after `fixed` and `minimums`; None where all are."""
        if self.fixed is None and self.minimums is None:
            return None
        option = np.arange(self.options)
        allowed = np.ones(self.costs.shape, dtype=np.bool_)
        if self.minimums is not None and self.groups is not None:
            allowed &= option >= self.minimums[self.groups][:, None]
        if self.fixed is not None:
            allowed &= (self.fixed[:, None] < 0) | (option == self.fixed[:, None])
        return frozen(allowed)

    @functools.cached_property
    def group_of(self) -> IntArray:
        """i64[C], `groups`, or zeros: without groups all channels are in one."""
        return np.zeros(self.channels, dtype=np.int64) if self.groups is None else self.groups

    @functools.cached_property
    def tiles(self) -> IntArray | None:
        """i64[G, n], `multiples` for each group (one without groups); None where all are 1."""
        if self.multiples is None or int(self.multiples.max()) == 1:
            return None
        return np.broadcast_to(self.multiples, (max(1, self.group_count), self.options))

    @functools.cached_property
    def minimum_size(self) -> int:
        """The bytes of every channel's smallest allowed option: the smallest feasible budget."""
        return int(self._masked(self.sizes, np.iinfo(np.int64).max).min(axis=1).sum())

    @functools.cached_property
    def maximum_size(self) -> int:
        """The bytes of every channel's largest allowed option: more budget changes nothing."""
        return int(self._masked(self.sizes, -1).max(axis=1).sum())

    def channel_name(self, channel: int) -> str:
        """A channel's name in messages: its number, and module and row where groups are named."""
        if self.groups is None or self.group_names is None:
            return f"channel {channel}"
        group = int(self.groups[channel])
        row = int(np.count_nonzero(self.groups[:channel] == group))
        return f"channel {channel} ({self.group_names[group]}, row {row})"

    def cost_of(self, choice: IntArray) -> float:
        """The summed cost of a choice i64[C]."""
        return float(pick(self.costs, choice).sum())

    def size_of(self, choice: IntArray) -> int:
        """The summed bytes of a choice i64[C]."""
        return int(pick(self.sizes, choice).sum())

    def with_budget(self, budget: int) -> "AllocationProblem":
        """The same problem under another budget."""
        return dataclasses.replace(self, budget=budget)

    @property
    def constraints(self) -> tuple[str, ...]:
        """The constraints beyond the budget and closed options; few solvers support them.

        "multiples", "resources".
        """
        tiled = self.tiles is not None
        return ("multiples",) * tiled + ("resources",) * bool(self.resources)

    def counts_of(self, choice: IntArray) -> IntArray:
        """i64[G, n], how many channels of each group take each option; one group without groups."""
        counts = np.zeros((max(1, self.group_count), self.options), dtype=np.int64)
        np.add.at(counts, (self.group_of, choice), 1)
        return counts

    def violation(self, choice: IntArray) -> str | None:
        """The constraint that a choice i64[C] violates, as a clause; None if it is feasible."""
        size = self.size_of(choice)
        if size > self.budget:
            return f"it takes {size:,} bytes of {self.budget:,}"
        if self.allowed is not None and not bool(pick(self.allowed, choice).all()):
            return "it takes an option that is closed"
        for resource in self.resources:
            used = resource.used_by(choice)
            if used > resource.limit:
                return f"it uses {used:,} of {resource.limit:,} {resource.name}"
        if self.tiles is not None and bool((self.counts_of(choice) % self.tiles).any()):
            return "its counts are not multiples of the tiles"
        return None

    def summary(self) -> "ProblemSummary":
        """Counts what makes an instance unusual; none of it is an error."""
        order = np.lexsort((self.costs, self.sizes), axis=1)
        costs = np.take_along_axis(self.costs, order, axis=1)
        sizes = np.take_along_axis(self.sizes, order, axis=1)
        rises = np.diff(costs, axis=1) > 0
        best_before = np.minimum.accumulate(costs, axis=1)[:, :-1]
        return ProblemSummary(
            channels=self.channels,
            options=self.options,
            budget=self.budget,
            minimum_size=self.minimum_size,
            maximum_size=self.maximum_size,
            non_monotone_channels=int(rises.any(axis=1).sum()),
            dominated_options=int((costs[:, 1:] >= best_before).sum()),
            equal_size_channels=int((np.diff(sizes, axis=1) == 0).any(axis=1).sum()),
            zero_cost_channels=int((self.costs == 0).all(axis=1).sum()),
            negative_cost_channels=int((self.costs < 0).any(axis=1).sum()),
            constrained_channels=0
            if self.allowed is None
            else int((~self.allowed).any(axis=1).sum()),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the problem to a `.safetensors` or `.npz` file, completely or not at all."""
        arrays = {"costs": self.costs, "sizes": self.sizes}
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                arrays[name] = value
        arrays |= {f"resource.{i}": resource.use for i, resource in enumerate(self.resources)}
        limits = [{"name": r.name, "limit": r.limit} for r in self.resources]
        header: dict[str, object] = {"budget": self.budget, "resources": limits}
        if self.group_names is not None:
            header["group_names"] = list(self.group_names)
        write_arrays(path, arrays, header, kind=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AllocationProblem":
        """Reads a problem written by `save` and validates it anew.

        Raises:
            InputError: the file is missing, damaged, of another kind, or holds an invalid problem.
        """
        arrays, header = read_arrays(path, kind=_FORMAT, required=("costs", "sizes"))
        names = header.get("group_names")
        try:
            return cls(
                costs=arrays["costs"],
                sizes=arrays["sizes"],
                budget=header["budget"],
                group_names=None if names is None else tuple(names),
                resources=tuple(
                    Resource(use=arrays[f"resource.{i}"], **described)
                    for i, described in enumerate(header.get("resources", ()))
                ),
                **{name: arrays.get(name) for name in _OPTIONAL},
            )
        except KeyError as error:
            raise InputError(f"{os.fspath(path)}: {error} is missing.") from error
        except TypeError as error:
            raise InputError(f"{os.fspath(path)}: damaged resources ({error}).") from error
        except InputError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error

    def _masked(self, table: IntArray, filler: int) -> IntArray:
        return table if self.allowed is None else np.where(self.allowed, table, filler)

    def _check_groups(self) -> None:
        if self.groups is None:
            for name in ("group_names", "minimums"):
                if getattr(self, name) is not None:
                    raise InputError(f"`{name}` needs `groups`, the group of every channel.")
            return
        low, high = int(self.groups.min()), int(self.groups.max())
        if low < 0 or high >= self.group_count:
            raise InputError(
                f"groups must lie in 0 .. {self.group_count - 1}, got values from {low} to {high}."
            )

    def _check_values(self) -> None:
        with np.errstate(over="ignore"):
            total = float(np.abs(self.costs).max(axis=1).sum())
        if not np.isfinite(total):
            bad = np.argwhere(~np.isfinite(self.costs))
            if len(bad) == 0:
                raise InputError(
                    "The costs are so large that their sum is not finite; rescale them."
                )
            channel, option = (int(i) for i in bad[0])
            raise InputError(
                f"costs: {self.channel_name(channel)}, option {option} is "
                f"{self.costs[channel, option]}; every cost must be finite ({len(bad):,} are not). "
                f"To forbid an option use `fixed` or `minimums`."
            )
        if int(self.sizes.min()) < 0:
            bad = np.argwhere(self.sizes < 0)
            channel, option = (int(i) for i in bad[0])
            raise InputError(
                f"sizes: {self.channel_name(channel)}, option {option} is "
                f"{self.sizes[channel, option]} bytes; sizes must not be negative "
                f"({len(bad):,} are)."
            )
        if float(self.sizes.max(axis=1).astype(np.float64).sum()) > _LARGEST_TOTAL:
            raise InputError("The sizes add up to more than 2**53 bytes; use a larger unit.")

    def _check_constraints(self) -> None:
        if self.fixed is not None:
            wrong = np.flatnonzero((self.fixed < -1) | (self.fixed >= self.options))
            if len(wrong):
                channel = int(wrong[0])
                raise InputError(
                    f"fixed: {self.channel_name(channel)} has {int(self.fixed[channel])}; expected "
                    f"an option 0 .. {self.options - 1}, or -1 for a free channel."
                )
        if self.minimums is not None:
            low, high = int(self.minimums.min()), int(self.minimums.max())
            if low < 0 or high >= self.options:
                raise InputError(
                    f"minimums must be options 0 .. {self.options - 1}, got values from {low} to "
                    f"{high}."
                )
        if self.multiples is not None and int(self.multiples.min()) < 1:
            raise InputError(f"multiples must be positive, got {self.multiples.tolist()}.")
        for resource in self.resources:
            if resource.use.shape != self.costs.shape:
                raise InputError(
                    f"resource {resource.name!r}: use must have shape {self.costs.shape}, got "
                    f"{resource.use.shape}."
                )
        if self.allowed is not None:
            closed = np.flatnonzero(~self.allowed.any(axis=1))
            if len(closed):
                channel = int(closed[0])
                raise InputError(
                    f"{self.channel_name(channel)} has no option left: it is fixed to an option "
                    f"below the minimum of its group."
                )


@dataclasses.dataclass(frozen=True)
class ProblemSummary:
    """What `AllocationProblem.summary` counts.

    A channel is non-monotone when a larger option costs more than a smaller one; an option is
    dominated when another option of the same channel is neither larger nor more expensive. No
    optimum needs a dominated option.
    """

    channels: int
    options: int
    budget: int
    minimum_size: int
    maximum_size: int
    non_monotone_channels: int
    dominated_options: int
    equal_size_channels: int
    zero_cost_channels: int
    negative_cost_channels: int
    constrained_channels: int


def _as_floats(value: ArrayLike) -> FloatArray:
    try:
        array = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"costs must be an array of numbers [channels, options]: {error}."
        ) from error
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"costs must have shape [channels, options], none of them 0, got {array.shape}."
        )
    return frozen(array)


def _as_integers(value: ArrayLike, name: str, shape: Sequence[int]) -> IntArray:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be an array of integers, got {array.dtype}.")
    if array.shape != tuple(shape):
        raise InputError(f"{name} must have shape {tuple(shape)}, got {array.shape}.")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name} must fit 64-bit signed integers.")
    return frozen(np.ascontiguousarray(array, dtype=np.int64))


def _as_budget(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InputError(f"budget must be a whole number of bytes, got {value!r}.")
    return operator.index(value)
