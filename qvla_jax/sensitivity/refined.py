"""First-order sensitivities everywhere, exact where the first order is least certain.

A few pairs (channel, bits) of every module type are probed exactly on a few frames. The scatter of
log(exact / first order) within a module type and bit-width shows where the first order cannot be
trusted, and the rest of the budget goes there, the most scattered first. On those frames F, and
with S the first-order sensitivity over the whole calibration set,

    S_refined[c, n] = S[c, n] * exact_F[c, n] / S_F[c, n]

for the pairs that were probed, and S[c, n] times the median of that ratio within module type and
bit-width (shrunk toward 1 if few pairs were probed) for all others. If the first order nearly
vanishes, that is if the ratio exceeds e^3, exact_F itself is used. Both parts of the ratio see the
same frames, so the frames' peculiarities cancel: eight frames suffice for a set of hundreds. S_F
uses all h a probes and has no noise.
"""

import dataclasses
from typing import Final

import numpy as np

from qvla_jax.array_typing import Bool, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.batches import FirstFrames
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants
from qvla_jax.sensitivity.probes import Probes
from qvla_jax.sensitivity.strata import module_types
from qvla_jax.sensitivity.sweep import Sweep

# Pairs of each module type and bit-width that are probed before anything is decided.
_PILOT: Final = 8
# The prior of a module type counts as this many probed pairs that need no correction and scatter
# like all pairs of that bit-width.
_PRIOR: Final = 4
_LARGEST_LOG_RATIO: Final = 3.0


def refined_costs(
    sweep: Sweep, *, probes: Probes, share: float, frames: int = 8
) -> tuple[Float[np.ndarray, "C n"], Float[np.ndarray, "C n"]]:
    """Refined sensitivities of every channel, and their standard errors over frames.

    Args:
        sweep: what to work with; its policy is in full precision.
        probes: of the first-order pass over the whole set.
        share: the budget: forward passes as a share of those of exact probing, C n per frame of the
            whole set.
        frames: frames of the exact probing.

    Raises:
        InputError: the share is not in (0, 1], the set is empty, or a cost is not finite.
    """
    check_share(share)
    calibration, bits, index = sweep.calibration, sweep.bits, sweep.index
    part = FirstFrames(calibration, min(frames, calibration.frames))
    few = dataclasses.replace(sweep, calibration=part)
    constants = layer_constants(sweep.layers, sweep.quantizer, bits)

    def first_order(
        of: Sweep, of_probes: Probes
    ) -> tuple[Float[np.ndarray, "C n"], Float[np.ndarray, "C n"]]:
        return mean_over_frames(frame_costs(of, constants, probes=of_probes))

    costs, error = first_order(sweep, probes)
    reference, _ = first_order(few, "full")
    exact = np.full(costs.shape, np.nan)

    def probe(pairs: Bool[np.ndarray, "C n"]) -> None:
        for column, b in enumerate(bits):
            rows = np.flatnonzero(pairs[:, column])
            if rows.size:
                measured, _ = exact_costs(dataclasses.replace(few, bits=(b,)), rows=rows)
                exact[rows, column] = measured[:, 0]

    budget = int(share * costs.size * calibration.frames / part.frames)
    _, types = module_types(index, sweep.policy.layout)
    rng = np.random.default_rng(sweep.seed)
    pilot = _pilot(types, reference > 0, budget, rng)
    probe(pilot)
    _, scatter = _by_type(types, _log_ratios(exact, reference))
    probe(_most_uncertain(scatter[types], costs, (reference > 0) & ~pilot, budget - pilot.sum()))
    ratios = _log_ratios(exact, reference)
    median, _ = _by_type(types, ratios)
    factor = np.exp(np.where(np.isnan(ratios), median[types], ratios))
    vanishes = np.abs(ratios) >= _LARGEST_LOG_RATIO
    return np.where(vanishes, exact, costs * factor), np.where(vanishes, error, error * factor)


def check_share(share: float) -> None:
    """Checks the budget of exact probing.

    Raises:
        InputError: it is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share of exact's forward passes: expected one in (0, 1], got {share}")


def _log_ratios(
    exact: Float[np.ndarray, "C n"], first_order: Float[np.ndarray, "C n"]
) -> Float[np.ndarray, "C n"]:
    """log(exact / first order), within bounds; NaN where nothing was probed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(exact) - np.log(first_order)
    ratios[np.isnan(exact)] = np.nan
    return np.clip(ratios, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _pilot(
    types: Int[np.ndarray, " C"],
    reached: Bool[np.ndarray, "C n"],
    budget: int,
    rng: np.random.Generator,
) -> Bool[np.ndarray, "C n"]:
    """Up to `_PILOT` pairs of each module type and option, at most half of the budget in total."""
    chosen = np.zeros_like(reached)
    strata = [
        (rng.permutation(np.flatnonzero((types == kind) & reached[:, column])), column)
        for kind in np.unique(types)
        for column in range(reached.shape[1])
    ]
    for place in range(_PILOT):
        for rows, column in strata:
            if place < len(rows) and chosen.sum() < max(budget // 2, 1):
                chosen[rows[place], column] = True
    return chosen


def _by_type(
    types: Int[np.ndarray, " C"], ratios: Float[np.ndarray, "C n"]
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, "m n"]]:
    """Median of the log ratios of each module type and option, and the spread around it."""
    shape = (int(types.max()) + 1, ratios.shape[1])
    median, scatter = np.zeros(shape), np.zeros(shape)
    for column in range(shape[1]):
        known = ratios[:, column]
        probed = ~np.isnan(known)
        common = np.mean(known[probed] ** 2) if probed.any() else 0.0
        for kind in range(shape[0]):
            own = known[probed & (types == kind)]
            weight = len(own) / (len(own) + _PRIOR)
            centre = np.median(own) if len(own) else 0.0
            square = np.mean((own - centre) ** 2) if len(own) else 0.0
            median[kind, column] = weight * centre
            scatter[kind, column] = np.sqrt(weight * square + (1 - weight) * common)
    return median, scatter


def _most_uncertain(
    scatter: Float[np.ndarray, "C n"],
    costs: Float[np.ndarray, "C n"],
    candidates: Bool[np.ndarray, "C n"],
    count: int,
) -> Bool[np.ndarray, "C n"]:
    """The `count` candidates with the largest scatter; ties go to those that cost most."""
    order = np.lexsort((-costs.ravel(), -scatter.ravel(), ~candidates.ravel()))
    chosen = np.zeros(costs.size, bool)
    chosen[order[: max(min(count, int(candidates.sum())), 0)]] = True
    return chosen.reshape(costs.shape)
