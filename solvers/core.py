"""Exact at full scale: fix what the dual bound decides, search the small remaining core.

With multiplier m and dual value L, option j of channel c has the reduced cost r = cost + m * size -
(least such value of the channel) >= 0, and a choice costs exactly L + sum of its reduced costs + m
* (unspent bytes). So a choice better than an incumbent has no option whose reduced cost reaches
`incumbent - L`: such options are excluded, and of millions of channels only hundreds or thousands
stay open, the *core* (Balas and Zemel, 1980).

The core is searched by dynamic programming over the bytes by which a choice departs from the dual
one, channel by channel in order of their second least reduced cost, which ends as soon as that
passes the best excess found (after Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", 1995); or by PuLP.
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_jax.solvers.arrays import FloatArray, IntArray, blocks
from qvla_jax.solvers.marginal import marginal_from
from qvla_jax.solvers.mip import solve_mip
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, register
from qvla_jax.solvers.relaxation import Relaxation, option_major, relax
from qvla_jax.solvers.solution import OPTIMALITY_TOLERANCE, Status

# Limit of the history from which the search traces back its best state.
_HISTORY_BYTES = 10**9


@dataclasses.dataclass(frozen=True)
class Core:
    """The channels that the bound leaves open, the likeliest to change first.

    Attributes:
        channel: i64[K].
        reduced: f64[K, n], reduced costs; infinite for closed options, 0 for the dual choice.
        added: i64[K, n], bytes relative to the dual choice.
        second: f64[K], least reduced cost besides the dual choice; rising.
    """

    channel: IntArray
    reduced: FloatArray
    added: IntArray
    second: FloatArray


@dataclasses.dataclass(frozen=True)
class Search:
    """What the dynamic program found.

    Attributes:
        choice: i64[C], no more expensive than the incumbent.
        excess: its cost above the dual value.
        lower_bound: no choice has less excess; equals `excess` when the search ended by itself.
        stages: channels that were searched.
        states: largest number of states at once.
        timed_out: True when time cut the search short.
    """

    choice: IntArray
    excess: float
    lower_bound: float
    stages: int
    states: int
    timed_out: bool


@register("core")
def core(
    problem: AllocationProblem, *, time_limit: float | None = 60.0, max_states: int = 50_000
) -> Proposal:
    """Exact for millions of channels: reduced-cost fixing, then dynamic programming on the core.

    Args:
        problem: the problem.
        time_limit: seconds, or None.
        max_states: states kept at once; beyond that, the least promising are dropped, and the proof
            is lost.
    """
    start = time.perf_counter()
    relaxation = relax(problem)
    incumbent = marginal_from(problem, relaxation).choice
    dual = _Dual.of(problem, relaxation)
    excess = dual.excess_of(incumbent)
    if excess <= dual.tolerance:
        return Proposal(incumbent, dual.value, "optimal", relaxation, {"core": 0})
    opened = dual.core(excess)
    left = None if time_limit is None else time_limit - (time.perf_counter() - start)
    found = search_core(dual, opened, incumbent, excess, time_limit=left, max_states=max_states)
    status: Status = "feasible"
    if found.lower_bound >= found.excess:
        status = "optimal"
    elif found.timed_out:
        status = "time_limit"
    bound = dual.value + found.lower_bound
    if status == "optimal":
        bound = problem.cost_of(found.choice)
    details = {"core": found.stages, "opened": len(opened.channel), "states": found.states}
    return Proposal(found.choice, bound, status, relaxation, details)


@register("ilp:core", requires=("pulp", "highspy"))
def ilp_core(
    problem: AllocationProblem,
    *,
    backend: str = "highs",
    time_limit: float | None = 50.0,
    threads: int = 1,
    max_core: int = 20_000,
) -> Proposal:
    """Exact for millions of channels: reduced-cost fixing, then PuLP on the core.

    A short dynamic program improves the incumbent first: less excess makes the core smaller.

    Args:
        problem: the problem.
        backend: "highs" or "cbc".
        time_limit: seconds in total, or None; HiGHS overruns its share by a few tenths of a second.
        threads: threads of the solver.
        max_core: maximum number of channels for PuLP; of a larger core it gets the likeliest ones,
            without a proof.
    """
    start = time.perf_counter()
    relaxation = relax(problem)
    incumbent = marginal_from(problem, relaxation).choice
    dual = _Dual.of(problem, relaxation)
    excess = dual.excess_of(incumbent)
    if excess <= dual.tolerance:
        return Proposal(incumbent, dual.value, "optimal", relaxation, {"core": 0})
    quick = search_core(
        dual,
        dual.core(excess),
        incumbent,
        excess,
        time_limit=time_limit,
        max_states=50_000,
        max_stages=300,
    )
    opened = dual.core(quick.excess)
    details: dict[str, Any] = {
        "core": min(len(opened.channel), max_core),
        "opened": len(opened.channel),
    }
    complete = len(opened.channel) <= max_core
    rows = opened.channel[:max_core]
    reduced, choice = opened.reduced[:max_core], quick.choice
    if len(rows) == 0:
        return Proposal(choice, problem.cost_of(choice), "optimal", relaxation, details)
    left = None if time_limit is None else time_limit - (time.perf_counter() - start)
    inside = problem.sizes[rows]
    outside = problem.size_of(choice) - int(inside[np.arange(len(rows)), choice[rows]].sum())
    result = solve_mip(
        np.where(np.isfinite(reduced), reduced, 0.0),
        inside,
        np.isfinite(reduced),
        problem.budget - outside,
        incumbent=choice[rows],
        slack_price=relaxation.multiplier,
        backend=backend,
        time_limit=left,
        threads=threads,
    )
    if result.choice is not None:
        improved = choice.copy()
        improved[rows] = result.choice
        choice = min(choice, improved, key=problem.cost_of)
    proven = complete and result.status == "optimal"
    # Both searches bound the excess; the quick one's bound holds for all channels.
    above = quick.lower_bound
    if complete and math.isfinite(result.lower_bound):
        above = max(above, result.lower_bound)
    bound = problem.cost_of(choice) if proven else dual.value + above
    status: Status = "feasible"
    if proven:
        status = "optimal"
    elif result.status == "time_limit":
        status = "time_limit"
    details |= {"variables": result.variables, "mip_status": result.status}
    return Proposal(choice, bound, status, relaxation, details)


@dataclasses.dataclass(frozen=True)
class _Dual:
    """Every channel's choice of least `cost + multiplier * size`, and excess above its value."""

    problem: AllocationProblem
    multiplier: float
    choice: IntArray
    cost: float
    slack: int

    @classmethod
    def of(cls, problem: AllocationProblem, relaxation: Relaxation) -> "_Dual":
        choice = relaxation.hulls.choice(relaxation.levels)
        slack = problem.budget - problem.size_of(choice)
        return cls(problem, relaxation.multiplier, choice, problem.cost_of(choice), slack)

    @property
    def value(self) -> float:
        """The dual value, without the allowance for rounding."""
        return self.cost - self.multiplier * self.slack

    @property
    def tolerance(self) -> float:
        """Excess that counts as zero."""
        return OPTIMALITY_TOLERANCE * max(abs(self.cost), abs(self.value))

    def excess_of(self, choice: IntArray) -> float:
        """Cost above the dual value, from the differing channels alone: little is rounded."""
        rows = np.flatnonzero(choice != self.choice)
        costs = self.problem.costs[rows]
        index = np.arange(len(rows))
        rise = costs[index, choice[rows]] - costs[index, self.choice[rows]]
        return math.fsum([*rise.tolist(), self.multiplier * self.slack])

    def core(self, excess: float) -> Core:
        """The channels with another option than the dual choice below an excess."""
        channels: list[IntArray] = []
        for block in blocks(self.problem.channels):
            reduced, _ = self._reduced(block)
            channels.append(np.flatnonzero((reduced < excess).sum(axis=0) > 1) + block.start)
        channel = np.concatenate(channels)
        reduced, added = self._reduced(channel)
        reduced = np.where(reduced < excess, reduced, np.inf)
        second = np.partition(reduced, 1, axis=0)[1]
        order = np.argsort(second, kind="stable")
        return Core(
            channel=channel[order],
            reduced=np.ascontiguousarray(reduced.T[order]),
            added=np.where(np.isfinite(reduced), added, 0).T[order].astype(np.int64),
            second=second[order],
        )

    def _reduced(self, rows: slice | IntArray) -> tuple[FloatArray, FloatArray]:
        costs, sizes = option_major(self.problem, rows)
        here = self.choice[rows][None, :]
        added = sizes - np.take_along_axis(sizes, here, axis=0)
        rise = costs - np.take_along_axis(costs, here, axis=0)
        # The dual choice is the least up to rounding.
        return np.maximum(rise + self.multiplier * added, 0.0), added


def search_core(
    dual: _Dual,
    opened: Core,
    incumbent: IntArray,
    excess: float,
    *,
    time_limit: float | None,
    max_states: int,
    max_stages: int | None = None,
) -> Search:
    """Dynamic programming over (bytes added to the dual choice, summed reduced cost).

    Args:
        dual: the dual choice.
        opened: the core for this excess.
        incumbent: i64[C], feasible.
        excess: the incumbent's.
        time_limit: seconds, or None.
        max_states: states kept at once.
        max_stages: channels searched at most.
    """
    start = time.perf_counter()
    price, slack = dual.multiplier, dual.slack
    added = np.zeros(1, dtype=np.int64)
    reduced = np.zeros(1)
    # For each state: its parent in the previous stage, and the option taken.
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    remembered = 0
    best: tuple[int, int] | None = None
    # No dropped state has less excess than this.
    dropped = math.inf
    peak, timed_out = 1, False
    # The dual choice itself fits: it leaves `slack` bytes unspent.
    if price * slack < excess:
        excess, best = price * slack, (0, 0)
    for k in range(len(opened.channel)):
        # Any result other than the states' own changes at least one more channel.
        following = float(opened.second[k])
        alive = reduced + following < excess
        if not alive.any():
            break
        timed_out = time_limit is not None and time.perf_counter() - start > time_limit
        if timed_out or k == max_stages or remembered > _HISTORY_BYTES:
            dropped = min(dropped, float(reduced[alive].min()) + following)
            break
        keep = np.flatnonzero(alive)
        if len(keep) > max_states:
            order = np.argpartition(reduced[keep], max_states)
            dropped = min(dropped, float(reduced[keep[order[max_states:]]].min()) + following)
            keep = np.sort(keep[order[:max_states]])
        options = np.flatnonzero(opened.reduced[k] < excess)
        new_added = np.concatenate([added[keep] + opened.added[k, j] for j in options])
        new_reduced = np.concatenate([reduced[keep] + opened.reduced[k, j] for j in options])
        # Sorted runs: the stable sort merges them in linear time.
        order = np.argsort(new_added, kind="stable")
        new_added, new_reduced = new_added[order], new_reduced[order]
        # A state that is neither smaller nor cheaper than another is dominated by it.
        costs = new_reduced - price * new_added
        floor = np.minimum.accumulate(costs)
        survives = np.concatenate([[True], costs[1:] < floor[:-1]])
        survives &= new_reduced < excess
        index = order[survives]
        added, reduced = new_added[survives], new_reduced[survives]
        parent = keep[index % len(keep)].astype(np.int32)
        option = options[index // len(keep)].astype(np.int16)
        history.append((parent, option))
        remembered += parent.nbytes + option.nbytes
        peak = max(peak, len(added))
        fits = int(np.searchsorted(added, slack, side="right"))
        if fits:
            value = reduced[:fits] + price * (slack - added[:fits])
            winner = int(value.argmin())
            if value[winner] < excess:
                excess, best = float(value[winner]), (len(history), winner)
    choice = incumbent
    if best is not None:
        choice = dual.choice.copy()
        stage, state = best
        while stage > 0:
            stage -= 1
            parents, taken = history[stage]
            choice[opened.channel[stage]] = taken[state]
            state = int(parents[state])
    return Search(choice, excess, min(excess, dropped), len(history), peak, timed_out)
