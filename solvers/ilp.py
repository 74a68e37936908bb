"""The problem handed to an integer programming solver as it stands."""

import numpy as np

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray
from qvla_jax.solvers.marginal import marginal_from
from qvla_jax.solvers.mip import MipResult, solve_mip
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import relax

_LEVELS = ("channel", "group")


@register("ilp", requires=("pulp",))
def ilp(
    problem: AllocationProblem,
    *,
    level: str = "channel",
    backend: str = "highs",
    time_limit: float | None = 60.0,
    gap: float = 0.0,
    threads: int = 1,
    warm_start: bool = True,
) -> Proposal:
    """Integer programming through PuLP: exact, for up to some ten thousand channels.

    Args:
        problem: The problem.
        level: "channel", or "group" for one option per group (layer-wise mixed precision).
        backend: "highs" or "cbc".
        time_limit: Seconds, or None.
        gap: Relative gap at which the search may stop.
        threads: Threads of the solver.
        warm_start: Starts from the solution of `greedy:marginal`.

    Raises:
        InputError: A setting is wrong, or `level="group"` without groups, or a group without a
            common option.
        BudgetError: No allocation by groups fits; the message states the least.
    """
    if level not in _LEVELS:
        raise InputError(f"level must be one of {', '.join(_LEVELS)}, got {level!r}.")
    if level == "group":
        costs, sizes, opened, member = _by_group(problem)
        masked = np.where(opened, sizes, np.iinfo(np.int64).max)
        if (least := int(masked.min(axis=1).sum())) > problem.budget:
            raise BudgetError(
                f"The budget of {problem.budget:,} bytes is too small for one option per group. "
                f"Raise it to at least {least} bytes, or allocate by channel."
            )
        # Closed options cost so much that no hull contains them.
        dear = np.where(opened, costs, np.abs(costs).sum() + 1.0)
        large = np.where(opened, sizes, problem.budget + 1)
        reduced = AllocationProblem(costs=dear, sizes=large, budget=problem.budget)
        relaxation = None
    else:
        costs, sizes, member = problem.costs, problem.sizes, np.arange(problem.channels)
        opened = (
            np.ones(costs.shape, dtype=np.bool_) if problem.allowed is None else problem.allowed
        )
        reduced = problem
        relaxation = relax(problem)
    incumbent = marginal_from(reduced, relaxation or relax(reduced)).choice
    result = solve_mip(
        costs,
        sizes,
        opened,
        problem.budget,
        incumbent=incumbent,
        backend=backend,
        time_limit=time_limit,
        gap=gap,
        threads=threads,
        warm_start=warm_start,
    )
    choice = better_choice(costs, incumbent, result)
    by_channel = level == "channel"
    return Proposal(
        choice[member],
        lower_bound=result.lower_bound if by_channel else None,
        status="time_limit"
        if result.status != "optimal"
        else "optimal"
        if by_channel and gap == 0
        else None,
        relaxation=relaxation,
        details={
            "variables": result.variables,
            "mip_status": result.status,
            "mip_lower_bound": float(result.lower_bound)
            if np.isfinite(result.lower_bound)
            else None,
        },
    )


def better_choice(costs: FloatArray, incumbent: IntArray, result: MipResult) -> IntArray:
    """The solver's choice, unless it has none or a dearer one than the incumbent."""
    if result.choice is None:
        return incumbent
    rows = np.arange(len(costs))
    is_better = costs[rows, result.choice].sum() <= costs[rows, incumbent].sum()
    return result.choice if is_better else incumbent


def _by_group(problem: AllocationProblem) -> tuple[FloatArray, IntArray, BoolArray, IntArray]:
    """Costs f64[G, n], sizes i64[G, n], what is open to all members, and each channel's group."""
    if problem.groups is None:
        raise InputError('level="group" needs a problem with groups.')
    present, member = np.unique(problem.groups, return_inverse=True)
    costs = np.zeros((len(present), problem.options))
    sizes = np.zeros((len(present), problem.options), dtype=np.int64)
    closed = np.zeros((len(present), problem.options), dtype=np.int64)
    np.add.at(costs, member, problem.costs)
    np.add.at(sizes, member, problem.sizes)
    if problem.allowed is not None:
        np.add.at(closed, member, (~problem.allowed).astype(np.int64))
    opened = closed == 0
    empty = np.flatnonzero(~opened.any(axis=1))
    if len(empty):
        raise InputError(
            f"Group {int(present[empty[0]])} has no option open to all of its channels."
        )
    return costs, sizes, opened, member.astype(np.int64)
