"""The dual of the budget constraints."""

from qvla_jax.errors import BudgetError
from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.filling import fill
from qvla_jax.solvers.pricing import Priced, priced_costs, relax_all
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.repairing import repair as repaired


@register("lagrangian", handles=("resources",))
def lagrangian(problem: AllocationProblem, *, repair: bool = True) -> Proposal:
    """Exact maximum of the Lagrangian dual, and the choice that it implies.

    Every channel minimizes `cost + multiplier * size` at the critical multiplier; where that leaves
    a tie, the longer option is taken as long as it fits. The choice is optimal for the bytes that
    it uses, and leaves less than one step's bytes unspent. With further budgets, options also pay
    for the resources that they use, at the prices that maximize the dual; what the choice then
    exceeds is given back where that costs least.

    Args:
        problem: the problem.
        repair: fills the unspent bytes.

    Raises:
        BudgetError: no allocation within all budgets exists, or none was found.
    """
    priced = relax_all(problem)
    if problem.resources:
        return Proposal(within_limits(problem, priced), relaxation=priced.relaxation)
    (choice,) = priced.choices
    return Proposal(fill(problem, choice) if repair else choice, relaxation=priced.relaxation)


def within_limits(problem: AllocationProblem, priced: Priced, *, attempts: int = 4) -> IntArray:
    """The cheapest feasible choice near those of the best prices.

    Raises:
        BudgetError: none was found.
    """
    best: IntArray | None = None
    weights = priced_costs(problem, priced.relaxation.prices)
    weights = weights + priced.relaxation.multiplier * problem.sizes
    for rank, choice in enumerate(priced.choices):
        feasible = problem.violation(choice) is None
        if not feasible:
            if rank >= attempts and best is not None:
                continue
            mended = repaired(problem, choice, weights)
            if mended is None:
                continue
            choice = mended
        filled = fill(problem, choice)
        if best is None or problem.cost_of(filled) < problem.cost_of(best):
            best = filled
    if best is None:
        raise BudgetError(
            "No allocation within all budgets was found, and none may exist; raise a limit, or let "
            "`ilp` search."
        )
    return best
