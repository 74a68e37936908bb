"""The exact solution by dynamic programming over the budget."""

import math

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register


@register("dynamic_programming")
def dynamic_programming(problem: AllocationProblem, *, max_states: int = 200_000_000) -> Proposal:
    """Exact for small budgets: the least cost for every budget, one channel at a time.

    Time and memory grow with channels times budget (in units of the sizes' greatest common
    divisor): meant for small problems and for checking the other solvers.

    Args:
        problem: the problem.
        max_states: largest table, in entries of one byte (two beyond 256 options).

    Raises:
        InputError: the table would be larger.
    """
    allowed = problem.allowed
    open_sizes = problem.sizes if allowed is None else np.where(allowed, problem.sizes, 2**53)
    smallest = open_sizes.min(axis=1)
    extra = problem.sizes - smallest[:, None]
    if allowed is not None:
        extra = np.where(allowed, extra, 0)
    unit = math.gcd(*(int(x) for x in np.unique(extra))) or 1
    extra //= unit
    capacity = min(
        problem.budget - problem.minimum_size, problem.maximum_size - problem.minimum_size
    )
    capacity //= unit
    states = problem.channels * (capacity + 1)
    if states > max_states:
        raise InputError(
            f"dynamic_programming needs a table of {states:,} entries ({problem.channels:,} "
            f"channels times {capacity + 1:,} budgets of {unit} bytes), more than max_states = "
            f"{max_states:,}. Use core, ilp or greedy:marginal."
        )

    # least[b]: the least cost of the channels so far within b units.
    least = np.zeros(capacity + 1)
    table = np.zeros(
        (problem.channels, capacity + 1), dtype=np.uint8 if problem.options <= 256 else np.uint16
    )
    for channel in range(problem.channels):
        updated = np.full(capacity + 1, np.inf)
        for option in range(problem.options):
            shift = int(extra[channel, option])
            if shift > capacity or (allowed is not None and not allowed[channel, option]):
                continue
            value = least[: capacity + 1 - shift] + problem.costs[channel, option]
            better = value < updated[shift:]
            np.copyto(updated[shift:], value, where=better)
            table[channel, shift:][better] = option
        least = updated

    choice = np.empty(problem.channels, dtype=np.int64)
    left = capacity
    for channel in reversed(range(problem.channels)):
        choice[channel] = table[channel, left]
        left -= int(extra[channel, choice[channel]])
    return Proposal(
        choice,
        lower_bound=problem.cost_of(choice),
        status="optimal",
        details={"states": states, "unit": unit},
    )
