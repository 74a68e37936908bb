"""The dual of the budget constraint."""

import numpy as np

from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.filling import fill
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import Relaxation, relax


@register("lagrangian")
def lagrangian(problem: AllocationProblem, *, repair: bool = True) -> Proposal:
    """Exact maximum of the Lagrangian dual, and the choice that it implies.

    Every channel minimizes `cost + multiplier * size` at the critical multiplier; where that leaves
    a tie, the longer option is taken as long as it fits. The choice is optimal for the bytes that
    it happens to use, and leaves less than one step's bytes unspent.

    Args:
        problem: The problem.
        repair: Fills the unspent bytes.
    """
    relaxation = relax(problem)
    levels, _ = take_ties(problem, relaxation)
    choice = relaxation.hulls.choice(levels)
    return Proposal(fill(problem, choice) if repair else choice, relaxation=relaxation)


def take_ties(problem: AllocationProblem, relaxation: Relaxation) -> tuple[IntArray, int | None]:
    """Takes the steps exactly as steep as the multiplier, in order, until one does not fit.

    Returns:
        i64[C], the levels reached, and the channel whose step is the first that does not fit (None
        where all fit).
    """
    hulls = relaxation.hulls
    levels = relaxation.levels.copy()
    if relaxation.multiplier == 0:
        return levels, None
    # Step-major order: no channel's second step comes before its first.
    step, channel = np.nonzero(hulls.gain == relaxation.multiplier)
    slack = problem.budget - problem.size_of(hulls.choice(levels))
    total = np.cumsum(hulls.size[step, channel])
    count = int(np.searchsorted(total, slack, side="right"))
    np.add.at(levels, channel[:count], 1)
    return levels, int(channel[count]) if count < len(channel) else None
