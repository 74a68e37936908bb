"""Sequential allocation: allocate, measure at the quantized point, allocate again.

Sensitivities are measured at the full-precision policy, one channel at a time. At an allocation,
with e(x) = A(x) - A*(x) the joint error there, moving channel c to option j changes the error by

    E || e + J dY ||^2 - E || e ||^2  =  2 E e.J dY  +  E || J dY ||^2        (first order in dY)

where dY is the change of the layer's output and J is taken at the quantized policy. The first term
is the gradient of the joint error along the move, and accounts for all other channels; the second
is the sensitivity of the move. Their sum is a table of costs, negative where a move undoes an
error, and 0 for staying; the knapsack with it is the next allocation.

Moves are judged individually, and many at once overshoot. So the second term is weighted like a
trust region: several weights are tried, the allocation with the smallest measured error is kept,
and the next round tries weights around the best one. The gradient is measured in every round; the
second term, which costs more, every few rounds, and channels that have moved since then do not move
again.
"""

import dataclasses
from typing import Final

import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Float, Int
from qvla_jax.errors import InputError
from qvla_jax.evaluation.objective import ActionErrorObjective
from qvla_jax.progress import Progress, no_progress
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.jacobian import LayerConstants, frame_costs
from qvla_jax.sensitivity.probes import Probes
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.solvers import AllocationProblem, SearchResult, solve
from qvla_jax.solvers.blackbox import Search

# Weights of the second term, as multiples of the middle one, and the first middle.
_STEPS: Final = (0.25, 0.5, 1.0, 2.0)
_FIRST: Final = 256.0


def allocate_sequentially(
    objective: ActionErrorObjective,
    frames: Calibration,
    problem: AllocationProblem,
    *,
    start: Int[np.ndarray, " C"] | None = None,
    rounds: int = 12,
    refresh: int = 6,
    probes: Probes = 2,
    solver: str = "greedy:marginal",
    seed: int = 0,
    progress: Progress = no_progress,
) -> SearchResult:
    """Alternates between allocating and measuring until the measured error stops falling.

    Args:
        objective: the measured error.
        frames: frames for measuring the second term; the objective's own.
        problem: budget and constraints; its costs give the start.
        start: the first allocation; None solves the problem.
        rounds: maximum number of rounds.
        refresh: rounds after which the second term is measured again.
        probes: random probe vectors for each frame, or "full".
        solver: solves the problem of each round.
        seed: of the probes.
        progress: called with the rounds done.

    Returns:
        The best allocation measured, never worse than the start.

    Raises:
        InputError: a setting is wrong, or the start is unusable.
    """
    if rounds < 0 or refresh < 1:
        raise InputError(f"expected rounds >= 0 and refresh >= 1, got {rounds} and {refresh}")
    search = Search(problem, objective, start, solver)
    fixed = np.full(problem.channels, -1) if problem.fixed is None else problem.fixed
    middle, measured_at, square = _FIRST, search.choice, np.zeros(problem.costs.shape)
    age = refresh
    for done in range(rounds):
        progress("sequential", done, rounds)
        if age >= refresh:
            square = move_costs(objective, frames, search.choice, probes=probes, seed=seed + done)
            measured_at, age = search.choice, 0
        age += 1
        linear = gradient_costs(objective, search.choice)
        moved = search.choice != measured_at
        held = np.where(moved, search.choice, fixed)
        candidates: list[Int[np.ndarray, " C"]] = []
        for step in _STEPS:
            costs = linear + middle * step * square
            turn = dataclasses.replace(problem, costs=costs, fixed=held)
            candidates.append(solve(turn, solver).choice)
        before = search.error
        errors = search.advance(candidates)
        if search.error < before:
            middle *= _STEPS[int(errors.argmin())]
        elif bool((candidates[-1] != search.choice).any()):
            middle *= 4 * _STEPS[-1]
        elif moved.any():
            age = refresh  # no channel that may still move improves anything
        else:
            break
    progress("sequential", rounds, rounds)
    return search.result()


def gradient_costs(
    objective: ActionErrorObjective, choice: Int[np.ndarray, " C"]
) -> Float[np.ndarray, "C n"]:
    """The first term: the joint error's derivative along each single move from `choice`.

    Args:
        objective: the error.
        choice: the allocation moved from.
    """
    gradient, here = objective.gradient(choice), objective.select(choice)
    linear = np.zeros((len(objective.table.index), len(objective.table.bits)))
    for layer, rows in objective.table.index.items():
        slope, now = gradient[layer.path], here[layer.path]
        options = objective.options[layer.path]
        moved = options["kernel"] - now["kernel"][None]
        along = jnp.einsum("nkc,kc->cn", moved, slope["kernel"], precision="highest")
        shifted = (options["bias"] - now["bias"][None]) * slope["bias"][None]
        linear[rows] = np.asarray(along + shifted.T)
    return linear


def move_costs(
    objective: ActionErrorObjective,
    frames: Calibration,
    choice: Int[np.ndarray, " C"],
    *,
    probes: Probes = 2,
    seed: int = 0,
) -> Float[np.ndarray, "C n"]:
    """The second term: the sensitivity of each single move from `choice`, at the policy there.

    Args:
        objective: the error.
        frames: frames to measure on.
        choice: the allocation moved from.
        probes: random probe vectors for each frame, or "full".
        seed: of the probes.
    """
    here = objective.select(choice)
    constants: dict[str, LayerConstants] = {}
    for layer in objective.table.index.layers:
        moved = objective.options[layer.path]["kernel"] - here[layer.path]["kernel"][None]
        mean = objective.table.quantizer.mean(layer.path)
        mean = np.zeros(layer.fan_in) if mean is None else mean
        constants[layer.path] = LayerConstants(
            changes=jnp.swapaxes(moved, 1, 2), mean=jnp.asarray(mean, jnp.float32)
        )
    sweep = Sweep(
        policy=objective.policy.replace(model=objective.model(choice)),
        calibration=frames,
        index=objective.table.index,
        seed=seed,
    )
    square, _ = mean_over_frames(frame_costs(sweep, constants, probes=probes))
    return square
