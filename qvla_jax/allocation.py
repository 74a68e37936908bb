"""From a table of sensitivities and a budget to bits for every channel."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from qvla_jax.precision import in_32_bits
from qvla_jax.quantization.allocation import Allocation, FrontPoint
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.solvers import relax, solve, sweep
from qvla_jax.solvers.arrays import pick

DEFAULT_SOLVER: Final = "greedy:marginal"
# With a budget of bytes read.
READ_SOLVER: Final = "lagrangian"
# Prices of a byte read, in bytes stored, that the front is drawn for; None: nothing but reads.
_PRICES: Final = (0.0, 0.05, 0.2, 0.5, 2.0, None)
_POINTS: Final = 400


@in_32_bits
def allocate(
    table: SensitivityTable,
    *,
    budget_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_read: float | None = None,
    minimum_bits: Mapping[str, int] | None = None,
    solver: str | None = None,
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
        budget_read: a second budget, on what a call of the policy reads: bits per weight, each
            weight counted as often as it is read. Memory holds what is stored; where it is slow,
            time goes with what is read.
        minimum_bits: regular expression -> minimum bits of the layers that it matches.
        solver: one of `qvla_jax.solvers.available()`; None takes "greedy:marginal", or "lagrangian"
            for two budgets.

    Raises:
        BudgetError: even the smallest option of every channel exceeds a budget.
        InputError: neither or both budgets are given, the solver is unknown, or a pattern of
            `minimum_bits` matches no layer.
    """
    problem = table.problem(
        budget_bits=budget_bits,
        budget_bytes=budget_bytes,
        budget_read=budget_read,
        minimum_bits=minimum_bits,
    )
    if solver is None:
        solver = DEFAULT_SOLVER if budget_read is None else READ_SOLVER
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
        budget_read=budget_read,
        read_bytes=int(pick(table.read_sizes, solution.choice).sum()),
    )


def read_front(
    table: SensitivityTable,
    budgets: Sequence[float],
    *,
    minimum_bits: Mapping[str, int] | None = None,
) -> tuple[FrontPoint, ...]:
    """What fewer bytes read cost in bytes stored, at the same predicted error.

    Each error is that of a budget of bytes stored alone. Along a line of the front the price of a
    byte read rises from nothing to that of everything.

    Args:
        table: from `sensitivities`.
        budgets: bits per weight whose errors the lines are for; those that cannot be met are left
            out.
        minimum_bits: as in `allocate`.

    Returns:
        Points, line by line; none where a call reads all weights equally often.
    """
    if len(set(table.reads_of_channels.tolist())) == 1:
        return ()
    problem = table.problem(
        budget_bytes=int(table.sizes.max(axis=1).sum()), minimum_bits=minimum_bits
    )
    stored = {bits: int(bits * table.index.num_weights / 8) for bits in budgets}
    stored = {bits: size for bits, size in stored.items() if size >= problem.minimum_size}
    if not stored:
        return ()
    errors = sweep(problem, list(stored.values())).cost
    reads = table.read_sizes
    points: dict[float, list[FrontPoint]] = {bits: [] for bits in stored}
    for price in _PRICES:
        sizes = reads if price is None else 100 * table.sizes + int(100 * price) * reads
        paid = dataclasses.replace(problem, sizes=sizes, budget=int(sizes.max(axis=1).sum()))
        front = sweep(paid, _POINTS)
        for bits, error in zip(stored, errors.tolist(), strict=True):
            # Costs fall along the front.
            point = int(np.searchsorted(-front.cost, -error * (1 + 1e-9)))
            if point == len(front.cost):
                continue
            choice = front.choice(point)
            points[bits].append(
                FrontPoint(
                    budget_bits=bits,
                    cost=problem.cost_of(choice),
                    stored_bytes=problem.size_of(choice),
                    read_bytes=int(pick(reads, choice).sum()),
                )
            )
    return tuple(point for line in points.values() for point in line)
