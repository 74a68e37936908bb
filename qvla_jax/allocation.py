"""From a table of sensitivities and a budget to bits for every channel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvla_jax.array_typing import Integer, NpArray
from qvla_jax.precision import in_32_bits
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.solvers import relax, solve
from qvla_jax.solvers.solution import relative_gap

DEFAULT_SOLVER = "greedy:marginal"


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """Bits for every channel, and how they were found.

    Attributes:
        bits: `[C]`, in the table's channel order; `allocate` attaches the table's quantizer for
            `quantize`.
        sensitivity: the method that the costs come from.
        solver: the solver's registered name.
        budget_bits: the budget in bits per quantized weight, counting everything stored.
        budget_bytes: the same in bytes.
        stored_bytes: what the allocation stores, at most `budget_bytes`.
        predicted_sse_normalized: the summed costs, which would be the joint error if errors simply
            added up.
        lower_bound: no allocation within the budget has a smaller sum of costs.
        seconds: the solver's run time.
        baseline: the costs are not those of the run's own method.
        matches: the bits of the uniform grid whose bytes are the budget, if it was chosen so.
    """

    bits: Integer[NpArray, " C"]
    sensitivity: str
    solver: str
    budget_bits: float
    budget_bytes: int
    stored_bytes: int
    predicted_sse_normalized: float
    lower_bound: float
    seconds: float
    baseline: bool = False
    matches: int | None = None

    @property
    def gap(self) -> float:
        """Relative excess of the summed costs over the lower bound; 0 is proven optimal."""
        return relative_gap(self.predicted_sse_normalized, self.lower_bound)

    @property
    def budget(self) -> str:
        """Names the budget: `3.5` (bits), or `uniform4` for the bytes of that uniform grid."""
        return f"{self.budget_bits:g}" if self.matches is None else f"uniform{self.matches}"

    @property
    def name(self) -> str:
        """Identifies the allocation within a run."""
        return f"{self.sensitivity}+{self.solver}@{self.budget}"

    def describe(self) -> dict[str, Any]:
        """All but the bits, as JSON types."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name != "bits"}


@in_32_bits
def allocate(
    table: SensitivityTable,
    *,
    budget_bits: float | None = None,
    budget_bytes: int | None = None,
    minimum_bits: Mapping[str, int] | None = None,
    solver: str = DEFAULT_SOLVER,
) -> Allocation:
    """Chooses a bit-width for every channel to minimize the summed cost within a budget.

    >>> import qvla_jax
    >>> policy = qvla_jax.random_policy("tiny-test")
    >>> frames = qvla_jax.calibration_set("bundled", frames=2)
    >>> table = qvla_jax.sensitivities(policy, frames)
    >>> allocation = qvla_jax.allocate(table, budget_bits=8.0)
    >>> allocation.stored_bytes <= allocation.budget_bytes
    True
    >>> allocation.lower_bound <= allocation.predicted_sse_normalized
    True
    >>> len(allocation.bits) == len(table.index)  # a width for each channel
    True

    For more control (resources, kernel tiles, comparing all solvers), pass `table.problem(...)` to
    `qvla_jax.solvers`; `table.bits_of(solution)` converts the result back.

    Args:
        table: from `sensitivities`.
        budget_bits: bits per quantized weight, counting everything stored (scales, biases, index,
            padding). Give this or `budget_bytes`.
        budget_bytes: the same in bytes.
        minimum_bits: regular expression -> minimum bits of the layers that it matches.
        solver: one of `qvla_jax.solvers.available()`.

    Raises:
        BudgetError: even the smallest option of every channel exceeds the budget.
        InputError: neither or both budgets are given, the solver is unknown, or a pattern of
            `minimum_bits` matches no layer.
    """
    problem = table.problem(
        budget_bits=budget_bits, budget_bytes=budget_bytes, minimum_bits=minimum_bits
    )
    solution = solve(problem, solver, relaxation=relax(problem))
    if budget_bits is None:
        budget_bits = 8 * problem.budget / table.index.num_weights
    return Allocation(
        bits=table.bits_of(solution),
        sensitivity=table.method,
        solver=solver,
        budget_bits=budget_bits,
        budget_bytes=problem.budget,
        stored_bytes=solution.size,
        predicted_sse_normalized=solution.cost,
        lower_bound=solution.lower_bound,
        seconds=solution.seconds,
    )
