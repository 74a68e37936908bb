"""From a table of sensitivities and a budget to bits for every channel."""

from collections.abc import Mapping

from qvla_jax.precision import in_32_bits
from qvla_jax.quantization.allocation import Allocation
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.solvers import relax, solve

DEFAULT_SOLVER = "greedy:marginal"


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
    `qvla_jax.solvers`; `table.bits_of(solution)` converts the result to bits, which `quantize`
    takes together with `quantizer=table.quantizer`.

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
        index=table.index,
        quantizer=table.quantizer if table.can_quantize else None,
        sensitivity=table.method,
        solver=solver,
        budget_bits=budget_bits,
        budget_bytes=problem.budget,
        stored_bytes=solution.size,
        predicted_sse_normalized=solution.cost,
        lower_bound=solution.lower_bound,
        seconds=solution.seconds,
    )
