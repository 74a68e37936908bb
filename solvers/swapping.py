"""Swaps at the margin: blocks of nearly indifferent channels, judged by a black-box objective.

By the separable costs, a channel whose alternative has almost no reduced cost may as well take it:
here the sum of costs is least informative and a measurement most. A proposal changes a block of
such channels, all within one module from one option to another (errors of one module add up), or
spread over all of them; the bytes are then balanced where that costs least by the separable costs.
A block that helps makes the next ones larger; a round without success makes them smaller.
"""

import dataclasses

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray, Progress, no_progress, pick
from qvla_jax.solvers.blackbox import Objective, Search, SearchResult, inner_solver
from qvla_jax.solvers.filling import fill
from qvla_jax.solvers.pricing import priced_costs, relax_all
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.repairing import repair


def local_search(
    problem: AllocationProblem,
    evaluate: Objective,
    *,
    start: IntArray | None = None,
    rounds: int = 20,
    population: int = 12,
    block: float = 0.01,
    margin: float = 0.2,
    seed: int = 0,
    progress: Progress = no_progress,
) -> SearchResult:
    """Swaps blocks of channels at the margin while the measured error falls.

    Args:
        problem: the problem, without counts in multiples.
        evaluate: i64[p, C] -> f64[p], the error of candidates, all feasible.
        start: i64[C]; None takes the separable solution.
        rounds: rounds of proposals; the best one of each is kept if it is better.
        population: proposals of a round.
        block: share of the channels that a proposal changes at first.
        margin: share of all single changes that count as marginal, by reduced cost per byte.
        seed: seed.
        progress: called with the rounds done.

    Raises:
        InputError: a setting is wrong, the problem requires counts in multiples, or the start is
            unusable.
    """
    if rounds < 0 or population < 1 or not 0 < block <= 1 or not 0 < margin <= 1:
        raise InputError(
            "local_search needs rounds >= 0, a population of 1 or more, and shares in (0, 1]; got "
            f"rounds={rounds}, population={population}, block={block}, margin={margin}."
        )
    if "multiples" in problem.constraints:
        raise InputError(
            "local_search does not honour multiples: a swap breaks the counts. Use evolve."
        )
    search = Search(problem, evaluate, start, inner_solver(problem))
    relaxation = relax_all(problem).relaxation
    weights = priced_costs(problem, relaxation.prices) + relaxation.multiplier * problem.sizes
    rng = np.random.default_rng(seed)
    size = block * problem.channels
    for done in range(rounds):
        progress("local search", done, rounds)
        moves = _marginal_moves(problem, search.choice, weights, relaxation.multiplier, margin)
        if len(moves) == 0:
            break
        before = search.error
        candidates = [
            candidate
            for _ in range(population)
            if (candidate := _swap(problem, search.choice, weights, moves, size, rng)) is not None
        ]
        search.advance(candidates)
        size *= 1.5 if search.error < before else 0.6
        size = float(np.clip(size, 1.0, problem.channels))
    progress("local search", rounds, rounds)
    return search.result()


def _marginal_moves(
    problem: AllocationProblem,
    choice: IntArray,
    weights: FloatArray,
    multiplier: float,
    margin: float,
) -> IntArray:
    """i64[m, 2], (channel, option) of the changes of least reduced cost per byte."""
    change = problem.sizes - pick(problem.sizes, choice)[:, None]
    reduced = weights - pick(weights, choice)[:, None]
    other = change != 0
    if problem.allowed is not None:
        other &= problem.allowed
    channel, option = np.nonzero(other)
    if len(channel) == 0:
        return np.empty((0, 2), dtype=np.int64)
    ratio = reduced[channel, option] / np.abs(change[channel, option])
    # Channels that cost nothing anywhere are not informative.
    ratio[ratio >= multiplier * (1 - 1e-9)] = np.inf
    count = max(1, int(margin * len(ratio)))
    nearest = np.argpartition(ratio, count - 1)[:count]
    nearest = np.sort(nearest[np.isfinite(ratio[nearest])])
    return np.stack([channel[nearest], option[nearest]], axis=1).astype(np.int64)


def _swap(
    problem: AllocationProblem,
    choice: IntArray,
    weights: FloatArray,
    moves: IntArray,
    size: float,
    rng: np.random.Generator,
) -> IntArray | None:
    """A feasible choice with a block of channels moved; None where the bytes cannot be balanced."""
    pool = moves
    if problem.groups is not None and rng.random() < 0.5:
        # One module, from one option to another: those of a random move.
        channel, option = moves[rng.integers(len(moves))]
        groups = problem.groups
        alike = (groups[moves[:, 0]] == groups[channel]) & (moves[:, 1] == option)
        pool = moves[alike & (choice[moves[:, 0]] == choice[channel])]
    count = int(np.clip(round(size), 1, len(pool)))
    taken = pool[rng.permutation(len(pool))[:count]]
    # The first of a channel's moves.
    _, first = np.unique(taken[:, 0], return_index=True)
    taken = taken[np.sort(first)]
    moved = choice.copy()
    moved[taken[:, 0]] = taken[:, 1]
    held = np.full(problem.channels, -1) if problem.fixed is None else problem.fixed.copy()
    held[taken[:, 0]] = taken[:, 1]
    try:
        frozen = dataclasses.replace(problem, fixed=held)
    except InputError:  # the block alone exceeds a budget
        return None
    mended = repair(frozen, moved, weights)
    return None if mended is None else fill(frozen, mended)
