"""The unreduced problem as an integer program."""

import dataclasses

import numpy as np

from qvla_jax.errors import BudgetError, InputError
from qvla_jax.solvers.alignment import greedy_aligned, price_of_tiles
from qvla_jax.solvers.arrays import IntArray
from qvla_jax.solvers.lagrangian import within_limits
from qvla_jax.solvers.marginal import marginal_from
from qvla_jax.solvers.mip import Tiles, solve_mip
from qvla_jax.solvers.pricing import relax_all
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import Relaxation
from qvla_jax.solvers.tying import tie

_LEVELS = ("channel", "group")


@register("ilp", requires=("pulp", "highspy"), handles=("multiples", "resources"))
def ilp(
    problem: AllocationProblem,
    *,
    level: str = "channel",
    backend: str = "highs",
    time_limit: float | None = 60.0,
    gap: float = 0.0,
    threads: int = 1,
    warm_start: bool = True,
    max_channels: int = 100_000,
) -> Proposal:
    """Integer programming through PuLP: exact, for up to about ten thousand channels.

    Args:
        problem: the problem.
        level: "channel", or "group" for one option per group (layer-wise mixed precision).
        backend: "highs" or "cbc".
        time_limit: seconds, or None.
        gap: relative gap at which the search may stop.
        threads: threads of the solver.
        warm_start: HiGHS starts from the solution of the heuristic for the problem's constraints
            (CBC never does, because it sometimes reports a start as the optimum); either way that
            solution is returned if the search finds nothing better.
        max_channels: maximum number of channels (or groups); building a larger model alone would
            take minutes and gigabytes of memory.

    Raises:
        InputError: a setting is wrong, the problem is too large, `level="group"` without groups, or
            a group without a common option.
        BudgetError: no allocation by groups fits; the message states the least.
    """
    if level not in _LEVELS:
        raise InputError(f"level must be one of {', '.join(_LEVELS)}, got {level!r}.")
    tied = None
    if level == "group":
        if problem.groups is None:
            raise InputError('level="group" needs a problem with groups.')
        tied = tie(problem, problem.groups)
    reduced = problem if tied is None else tied.problem
    if reduced.channels > max_channels:
        raise InputError(
            f"ilp takes up to max_channels = {max_channels:,} channels, the problem has "
            f"{reduced.channels:,}; use ilp:core or core, which leave most of them out."
        )
    relaxation, incumbent = _incumbent(reduced)
    result = solve_mip(
        reduced.costs,
        reduced.sizes,
        np.ones(reduced.costs.shape, dtype=np.bool_)
        if reduced.allowed is None
        else reduced.allowed,
        reduced.budget,
        incumbent=incumbent,
        resources=reduced.resources,
        tiles=_tiles(reduced),
        backend=backend,
        time_limit=time_limit,
        gap=gap,
        threads=threads,
        warm_start=warm_start,
    )
    found = [choice for choice in (incumbent, result.choice) if choice is not None]
    if not found:
        reason = "exists" if result.status == "infeasible" else "was found within the time limit"
        raise BudgetError(
            f"No allocation within {reduced.budget:,} bytes that keeps "
            f"{' and '.join(reduced.constraints)} {reason}."
        )
    choice = min(found, key=reduced.cost_of)
    details = {
        "variables": result.variables,
        "mip_status": result.status,
        "mip_lower_bound": result.lower_bound if np.isfinite(result.lower_bound) else None,
    }
    if "multiples" in reduced.constraints:
        _, loose = _incumbent(dataclasses.replace(reduced, multiples=None))
        if loose is not None:
            details |= price_of_tiles(reduced, choice, loose)
    status = "time_limit" if result.status == "time_limit" else None
    if tied is not None:
        # The certificate is that of the channel-wise problem, whose optimum may be better.
        return Proposal(tied.expand(choice), status=status, details=details)
    if result.status == "optimal" and gap == 0:
        status = "optimal"
    return Proposal(choice, result.lower_bound, status, relaxation, details)


def _incumbent(problem: AllocationProblem) -> tuple[Relaxation, IntArray | None]:
    """The relaxation, and a feasible choice where a heuristic finds one."""
    priced = relax_all(problem)
    try:
        if "multiples" in problem.constraints:
            choice = None if problem.resources else greedy_aligned(problem).choice
        elif problem.resources:
            choice = within_limits(problem, priced)
        else:
            choice = marginal_from(problem, priced.relaxation).choice
    except InputError:  # includes BudgetError: a choice may exist even if the heuristic found none
        choice = None
    return priced.relaxation, choice


def _tiles(problem: AllocationProblem) -> Tiles | None:
    if problem.tiles is None:
        return None
    return Tiles(problem.group_of, problem.tiles)
