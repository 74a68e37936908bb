"""How errors of many channels add up: measured joint factors.

An allocation changes thousands of channels together, and the joint error of pruned channels is
several times the sum of their single errors, because each loses a little signal in the same
direction. The factor of option n is

    measured || A_n(x) - A*(x) ||^2  /  sum of the costs,     at least 1,

where A_n is the policy in which the channels that a tight budget puts at option n are at n, and all
others have 16 bits. The allocator then uses the joint cost of options, and predicts the joint error
instead of the sum. `alternate` measures the factors at its own allocation instead of a reference,
and allocates again.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np

from qvla_jax import sharding
from qvla_jax.array_typing import Float, Int
from qvla_jax.inference.comparable import comparable
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import quantize
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.layers import LayerRules
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
    batch: int = 8,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """One factor per option of the table; 1 for 16 bits and for unused options.

    Args:
        policy: the full-precision policy.
        calibration: the table's calibration set.
        table: single-channel costs; the factors count and weigh the entries of a chunk as they do.
        frames: frames that the joint errors are measured on.
        batch: frames at a time.
        rules: those of the table; None takes those of the policy's layout.
        progress: called with the options done.
    """
    single = dataclasses.replace(table, joint=None)
    bits = single.bits_of(solve(_reference(single), "greedy:marginal"))
    measured = _JointErrors(
        policy, calibration, table, frames=frames, batch=batch, rules=rules, progress=progress
    )
    return measured.factors(bits)


def alternate(
    policy: Policy,
    calibration: Calibration,
    table: SensitivityTable,
    allocate: Callable[[SensitivityTable], Int[np.ndarray, " C"]],
    *,
    rounds: int = 3,
    frames: int = 64,
    batch: int = 8,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> Int[np.ndarray, " C"]:
    """Bits of channels, from alternating between allocation and joint factors.

    Args:
        policy: the full-precision policy.
        calibration: the table's calibration set.
        table: costs; the first allocation uses its own joint factors.
        allocate: bits [C] of a table.
        rounds: maximum number of allocations after the first; stops when an allocation repeats.
        frames: frames that the joint errors are measured on.
        batch: frames at a time.
        rules: those of the table; None takes those of the policy's layout.
        progress: called with the options done.

    Returns:
        The allocation with the smallest measured error of the action.
    """
    measured = _JointErrors(
        policy, calibration, table, frames=frames, batch=batch, rules=rules, progress=progress
    )
    bits = allocate(table)
    best, least = bits, measured.error(bits)
    for _ in range(rounds):
        last = bits
        bits = allocate(dataclasses.replace(table, joint=measured.factors(last)))
        if np.array_equal(bits, last):
            break
        if (error := measured.error(bits)) < least:
            best, least = bits, error
    return best


class _JointErrors:
    """Action errors of whole allocations, on the first calibration frames."""

    def __init__(
        self,
        policy: Policy,
        calibration: Calibration,
        table: SensitivityTable,
        *,
        frames: int,
        batch: int,
        rules: LayerRules | None,
        progress: Progress,
    ):
        self._policy, self._table, self._rules = policy, table, rules
        self._progress = progress
        part = FirstFrames(calibration, min(frames, calibration.frames))
        mesh = sharding.data_mesh()
        size = -(-min(batch, part.frames) // mesh.size) * mesh.size
        self._frames = part.frames
        self._inputs = [
            sharding.shard_batch(mesh, sharding.pad_batch(policy.prepare(few), size)[0])
            for few in part.batches(size)
        ]
        self._source = self._actions(policy)
        self._weights, self._steps = table.action_weights, table.executed_steps

    def error(self, bits: Int[np.ndarray, " C"]) -> float:
        """Squared error of the action with these bits, as costs weigh it."""
        changed = quantize(
            self._policy, bits, quantizer=self._table.quantizer, rules=self._rules, packed=False
        )
        change = (self._actions(changed).astype(np.float64) - self._source)[:, : self._steps]
        return _mean_square(change, self._weights)

    def _actions(self, policy: Policy) -> Float[np.ndarray, "b h a"]:
        return np.concatenate(comparable(policy).run_all(self._inputs))[: self._frames]

    def factors(self, bits: Int[np.ndarray, " C"]) -> tuple[float, ...]:
        """One factor per option, for the channels that have it here, jointly."""
        factors = []
        for done, option in enumerate(self._table.bits):
            self._progress("joint errors", done, len(self._table.bits))
            predicted = _sum(self._table, bits, option)
            if option == SOURCE or predicted <= 0:
                factors.append(1.0)
                continue
            ratio = self.error(np.where(bits == option, option, SOURCE)) / predicted
            factors.append(float(np.clip(ratio, 1.0, _LARGEST)))
        self._progress("joint errors", len(self._table.bits), len(self._table.bits))
        return tuple(factors)


def _reference(table: SensitivityTable) -> AllocationProblem:
    least = table.sizes.min(axis=1).sum()
    near = min(range(len(table.bits)), key=lambda i: abs(table.bits[i] - 4))
    most = table.sizes[:, near].sum()
    return table.problem(budget_bytes=int(max(least, least + _TIGHTNESS * (most - least))))


def _sum(table: SensitivityTable, bits: np.ndarray, option: int) -> float:
    return float(table.costs[bits == option, table.bits.index(option)].sum())


def _mean_square(
    change: Float[np.ndarray, "b h a"], weights: Float[np.ndarray, " a"] | None
) -> float:
    return float(np.mean(np.sum(change**2 * (1.0 if weights is None else weights), axis=(1, 2))))
