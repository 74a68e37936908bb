"""A solver's answer with its certificate, and an independent check of both."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import IntArray, frozen, pick
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.storage import read_arrays, write_arrays

_FORMAT = "qvla_jax.allocation_solution"

Status = Literal["optimal", "feasible", "time_limit"]

# Below this relative gap a solution counts as optimal: what float64 sums of millions of costs can
# resolve.
OPTIMALITY_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """A feasible allocation and what is known about its distance from the optimum.

    Attributes:
        choice: i64[C], the option of each channel.
        cost: The summed cost of the choice.
        size: Its summed bytes; at most the problem's budget.
        lower_bound: No feasible allocation costs less than this.
        seconds: Wall-clock time that the solver took, without that of the certificate.
        status: "optimal" (the gap is below `OPTIMALITY_TOLERANCE`, or an exact search ended),
            "time_limit" (an exact search was cut short) or "feasible".
        solver: The registered name of the solver.
        settings: The settings it ran with, defaults included.
        multiplier: A Lagrange multiplier in cost per byte; anybody can recompute a lower bound from
            it.
        prices: The same for each of the problem's resources, in cost per unit; empty where the
            bound disregards them.
        details: Further facts that the solver reports, by name.
    """

    choice: IntArray
    cost: float
    size: int
    lower_bound: float
    seconds: float
    status: Status
    solver: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    multiplier: float = 0.0
    prices: tuple[float, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def gap(self) -> float:
        """Relative gap: (cost - lower_bound) / max(|cost|, |lower_bound|), 0 where both are 0."""
        return relative_gap(self.cost, self.lower_bound)

    def counts(self, options: int) -> IntArray:
        """i64[n], how many channels take each of the n options."""
        return np.bincount(self.choice, minlength=options).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Everything but the choice, as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["choice"]
        fields |= {"settings": dict(self.settings), "details": dict(self.details)}
        return json.loads(json.dumps({**fields, "gap": self.gap}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the solution to a `.safetensors` or `.npz` file, completely or not at all."""
        write_arrays(path, {"choice": self.choice}, self.to_json(), kind=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Solution":
        """Reads a solution written by `save`.

        Raises:
            InputError: The file is missing, damaged or of another kind.
        """
        arrays, header = read_arrays(path, kind=_FORMAT, required=("choice",))
        names = {field.name for field in dataclasses.fields(cls)} - {"choice"}
        missing = sorted(names - header.keys())
        if missing:
            raise InputError(f"{os.fspath(path)}: the header lacks {missing}.")
        choice = frozen(arrays["choice"].astype(np.int64))
        header["prices"] = tuple(header["prices"])
        return cls(choice=choice, **{name: header[name] for name in names})


def relative_gap(cost: float, lower_bound: float) -> float:
    """The gap of `Solution.gap`."""
    scale = max(abs(cost), abs(lower_bound))
    return 0.0 if scale == 0 else max(0.0, (cost - lower_bound) / scale)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        failures: One sentence for each claim that does not hold; empty when the solution is sound.
        cost: The cost, recomputed with exactly rounded summation.
        size: The bytes, recomputed.
        dual_bound: The lower bound that the solution's multiplier proves by itself.
        bound_proof: "multiplier" when `dual_bound` proves the claimed bound; "search" when the
            solver claims a tighter one from an exhaustive search, which cannot be checked without
            repeating it.
    """

    failures: tuple[str, ...]
    cost: float
    size: int
    dual_bound: float
    bound_proof: Literal["multiplier", "search"]

    @property
    def ok(self) -> bool:
        """True when every claim holds."""
        return not self.failures


def verify(problem: AllocationProblem, solution: Solution) -> Verification:
    """Checks a solution's claims from the problem's numbers alone.

    It shares no code with the solvers: the sums are exactly rounded ones, the bound is the
    Lagrangian dual at the solution's multiplier, evaluated option by option.

    Args:
        problem: The problem that was solved.
        solution: Any solution of it, whoever made it.

    Returns:
        The recomputed figures, and a sentence for every claim that does not hold.
    """
    channels, options = problem.costs.shape
    choice = np.asarray(solution.choice)
    failures: list[str] = []
    valid = choice.shape == (channels,) and bool(((choice >= 0) & (choice < options)).all())
    if not valid:
        failures.append(
            f"choice must hold one option 0 .. {options - 1} for each of {channels} channels."
        )
        return Verification(tuple(failures), math.nan, 0, -math.inf, "search")

    cost = math.fsum(pick(problem.costs, choice).tolist())
    size = sum(pick(problem.sizes, choice).tolist())
    scale = math.fsum(np.abs(pick(problem.costs, choice)).tolist())
    if size > problem.budget:
        failures.append(f"{size} bytes exceed the budget of {problem.budget}.")
    if size != solution.size:
        failures.append(f"the size is {size} bytes, not {solution.size}.")
    if not math.isclose(cost, solution.cost, rel_tol=1e-12, abs_tol=1e-12 * scale):
        failures.append(f"the cost is {cost!r}, not {solution.cost!r}.")
    if problem.allowed is not None:
        closed = np.flatnonzero(~pick(problem.allowed, choice))
        if len(closed):
            failures.append(f"{problem.channel_name(int(closed[0]))} takes an option closed to it.")

    for resource in problem.resources:
        used = sum(pick(resource.use, choice).tolist())
        if used > resource.limit:
            failures.append(f"{used} exceed the limit of {resource.limit} on {resource.name}.")
    if problem.multiples is not None:
        failures += _broken_tiles(problem, choice)

    dual_bound, terms = _dual_bound(problem, solution.multiplier, solution.prices)
    tolerance = 1e-12 * max(abs(dual_bound), scale, terms * 1e-3)
    for price in (solution.multiplier, *solution.prices):
        if price < 0 or not math.isfinite(price):
            failures.append(f"the multiplier must be finite and not negative, got {price}.")
    if solution.lower_bound > cost + tolerance:
        failures.append(f"the lower bound {solution.lower_bound!r} exceeds the cost {cost!r}.")
    proven = solution.lower_bound <= dual_bound + tolerance
    gap = relative_gap(cost, solution.lower_bound)
    if solution.status not in get_args(Status):
        failures.append(f"unknown status {solution.status!r}.")
    if solution.status == "optimal" and gap > 10 * OPTIMALITY_TOLERANCE:
        failures.append(f"called optimal with a relative gap of {gap:.3g}.")
    return Verification(
        tuple(failures), cost, size, dual_bound, "multiplier" if proven else "search"
    )


def _broken_tiles(problem: AllocationProblem, choice: IntArray) -> list[str]:
    """A sentence for each option whose count in some group is no multiple of its tile."""
    assert problem.multiples is not None
    groups = np.zeros(len(choice), dtype=np.int64) if problem.groups is None else problem.groups
    found: list[str] = []
    for option, multiple in enumerate(problem.multiples.tolist()):
        labels, counts = np.unique(groups[choice == option], return_counts=True)
        wrong = np.flatnonzero(counts % multiple)
        if len(wrong):
            label, count = int(labels[wrong[0]]), int(counts[wrong[0]])
            found.append(
                f"{count} channels of group {label} take option {option}: no multiple of "
                f"{multiple}."
            )
    return found


def _dual_bound(
    problem: AllocationProblem, multiplier: float, prices: tuple[float, ...]
) -> tuple[float, float]:
    """The dual value at a multiplier and prices, and the summed magnitude of its terms."""
    if not (0 <= multiplier < math.inf and all(0 <= price < math.inf for price in prices)):
        return -math.inf, 0.0
    penalized = problem.costs + multiplier * problem.sizes
    limits = [multiplier * problem.budget]
    for price, resource in zip(prices, problem.resources, strict=False):
        penalized = penalized + price * resource.use
        limits.append(price * resource.limit)
    if problem.allowed is not None:
        penalized = np.where(problem.allowed, penalized, np.inf)
    best = cast("list[float]", penalized.min(axis=1).tolist())
    paid = math.fsum(limits)
    return math.fsum([*best, -paid]), math.fsum(map(abs, best)) + paid
