"""How errors of many channels add up: joint factors, measured.

An allocation changes thousands of channels together, and the joint error of pruned ones exceeds the
sum of their single errors several times: each loses a little signal in the same direction. The
factor of option n is

    measured || A_n(x) - A*(x) ||^2  /  sum of the costs,     at least 1,

A_n being the policy whose channels that a tight budget puts at option n are all at n, and all
others at 16 bits. The allocator then pays what options cost in company, and predicts the joint
error instead of the sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.inference.policy import Policy
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.apply import quantize
from qvla_jax.quantization.grid import SOURCE
from qvla_jax.quantization.layers import DEFAULT_RULES, LayerRules
from qvla_jax.sensitivity.batches import Calibration, FirstFrames
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.solvers import AllocationProblem, solve

# Budget of the reference allocation, between the smallest options and all channels at 4 bits (or
# the nearest option): about 3 bits per weight.
_TIGHTNESS: Final = 2 / 3
_LARGEST: Final = 100.0


def joint_factors(
    policy: Policy,
    calibration: Calibration,
    table: SensitivityTable,
    *,
    frames: int = 64,
    batch: int = 32,
    rules: LayerRules = DEFAULT_RULES,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """One factor for each option of the table; 1 for 16 bits and for options that nobody takes.

    Args:
        policy: the full-precision policy.
        calibration: the table's calibration set.
        table: single-channel costs; where they weigh action dimensions, so do the factors.
        frames: frames that the joint errors are measured on.
        batch: frames at a time.
        rules: those of the table.
        progress: called with the options done.
    """
    single = dataclasses.replace(table, joint=None)
    bits = np.asarray(single.bits_of(solve(_reference(single), "greedy:marginal")))
    part = FirstFrames(calibration, min(frames, calibration.frames))
    observations = list(part.batches(batch))
    source = [policy.infer_normalized(batch) for batch in observations]
    weights = table.provenance.get("settings", {}).get("action_weights")
    factors = []
    for done, option in enumerate(table.bits):
        progress("joint errors", done, len(table.bits))
        only = np.where(bits == option, option, SOURCE)
        predicted = _sum(single, bits, option)
        if option == SOURCE or predicted <= 0:
            factors.append(1.0)
            continue
        changed = quantize(policy, only, quantizer=table.quantizer, rules=rules, packed=False)
        actions = [changed.infer_normalized(batch) for batch in observations]
        ratio = _mean_square(actions, source, weights) / predicted
        factors.append(float(np.clip(ratio, 1.0, _LARGEST)))
    progress("joint errors", len(table.bits), len(table.bits))
    return tuple(factors)


def _reference(table: SensitivityTable) -> AllocationProblem:
    least = table.sizes.min(axis=1).sum()
    near = min(range(len(table.bits)), key=lambda i: abs(table.bits[i] - 4))
    most = table.sizes[:, near].sum()
    return table.problem(budget_bytes=int(max(least, least + _TIGHTNESS * (most - least))))


def _sum(table: SensitivityTable, bits: np.ndarray, option: int) -> float:
    return float(table.costs[bits == option, table.bits.index(option)].sum())


def _mean_square(
    a: Sequence[Float[np.ndarray, "b h a"]],
    b: Sequence[Float[np.ndarray, "b h a"]],
    weights: Sequence[float] | None,
) -> float:
    change = np.concatenate(a).astype(np.float64) - np.concatenate(b)
    return float(np.mean(np.sum(change**2 * (1.0 if weights is None else weights), axis=(1, 2))))
