"""Marginal gain per byte on the convex hulls, from below and from above."""

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import IntArray, blocks
from qvla_jax.solvers.filling import fill
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import Relaxation, option_major, relax, take_ties

_DIRECTIONS = ("promote", "demote", "both")


@register("greedy:marginal")
def greedy_marginal(problem: AllocationProblem, *, direction: str = "both") -> Proposal:
    """Steps that save most cost per byte on each channel's convex hull; fills the slack.

    Both directions stop at the step at which the budget runs out. Promotion leaves that step out
    and fills the remaining bytes; demotion takes it, gives the excess back where that costs least,
    and then also fills.

    Args:
        problem: the problem.
        direction: "promote", "demote" or "both", which keeps the cheaper of the two results.
    """
    if direction not in _DIRECTIONS:
        raise InputError(f"direction must be one of {', '.join(_DIRECTIONS)}, got {direction!r}.")
    return marginal_from(problem, relax(problem), direction=direction)


def marginal_from(
    problem: AllocationProblem, relaxation: Relaxation, *, direction: str = "both"
) -> Proposal:
    """`greedy:marginal` on an existing relaxation."""
    levels, critical = take_ties(problem, relaxation)
    lower = relaxation.hulls.choice(levels)
    starts: list[IntArray] = []
    if direction != "demote" or critical is None:
        starts.append(lower)
    if direction != "promote" and critical is not None:
        levels[critical] += 1
        starts += _demotions(problem, relaxation.hulls.choice(levels), relaxation.multiplier)
    filled = [fill(problem, start) for start in starts]
    return Proposal(min(filled, key=problem.cost_of), relaxation=relaxation)


def _demotions(problem: AllocationProblem, choice: IntArray, multiplier: float) -> list[IntArray]:
    """Feasible choices one demotion away from a choice that exceeds the budget.

    The two demotions are the one that loses least, and the one that loses least after the bytes
    that it frees beyond the excess are sold at the multiplier. There always is one: undoing the
    step that exceeded the budget.
    """
    excess = problem.size_of(choice) - problem.budget
    best: dict[float, tuple[float, int, int]] = {}
    for block in blocks(problem.channels):
        costs, sizes = option_major(problem, block)
        here = choice[block][None, :]
        freed = np.take_along_axis(sizes, here, axis=0) - sizes
        loss = costs - np.take_along_axis(costs, here, axis=0)
        for price in (0.0, multiplier):
            with np.errstate(invalid="ignore"):
                value = np.where(freed >= excess, loss - price * (freed - excess), np.inf)
            option, channel = np.unravel_index(int(value.argmin()), value.shape)
            found = (float(value[option, channel]), int(channel) + block.start, int(option))
            best[price] = min(best.get(price, found), found)
    demoted: list[IntArray] = []
    for channel, option in {(channel, option) for _, channel, option in best.values()}:
        changed = choice.copy()
        changed[channel] = option
        demoted.append(changed)
    return demoted
