"""The baseline: the same option for every channel."""

import numpy as np

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register


@register("uniform")
def uniform(problem: AllocationProblem, *, option: int | None = None) -> Proposal:
    """The same option for every channel: the given one, or the cheapest that fits.

    A channel to which the option is closed takes the open option nearest above it in index, or else
    the nearest below.

    Args:
        problem: the problem.
        option: the option to take; None tries all.

    Raises:
        BudgetError: no single option fits the budget.
        InputError: there is no such option.
    """
    if option is not None and not 0 <= option < problem.options:
        raise InputError(f"option must be 0 .. {problem.options - 1} or None, got {option}.")
    candidates = range(problem.options) if option is None else [option]
    choices = {j: _same_option(problem, j) for j in candidates}
    sizes = {j: problem.size_of(choice) for j, choice in choices.items()}
    fitting = [j for j in candidates if sizes[j] <= problem.budget]
    if not fitting:
        least = min(sizes, key=sizes.__getitem__)
        raise BudgetError(
            f"The budget of {problem.budget:,} bytes is too small for one option for every "
            f"channel: option {least} takes {sizes[least]} bytes. "
            f"Raise the budget to at least that, or use "
            f"another solver."
        )
    best = min(fitting, key=lambda j: (problem.cost_of(choices[j]), sizes[j]))
    return Proposal(choices[best], details={"option": best})


def _same_option(problem: AllocationProblem, option: int) -> IntArray:
    if problem.allowed is None:
        return np.full(problem.channels, option, dtype=np.int64)
    # Distances upwards rank before distances downwards.
    index = np.arange(problem.options)
    distance = np.where(index >= option, index - option, problem.options + option - index)
    return np.where(problem.allowed, distance, 2 * problem.options).argmin(axis=1)
