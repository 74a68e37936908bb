"""Cumulative sensitivities: the cost of a channel along a whole trajectory.

    S[e, c, n] = sum over the steps t of trajectory e of || A_{c}^{(n)}(x_t) - A*(x_t) ||^2

(QVLA, arXiv 2602.03782, sums its single-step sensitivity along a trajectory), each term to first
order as in sensitivity.jacobian. The steps are those of the calibration set: if its `stride` is the
length of a chunk, those at which the policy is queried.
"""

from collections.abc import Sequence

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.layers import LayerRules, quantizable_layers
from qvla_jax.sensitivity.accumulate import check_finite
from qvla_jax.sensitivity.batches import Calibration, ModelPolicy
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants
from qvla_jax.sensitivity.probes import DEFAULT_PROBES, Probes
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sensitivity.table import SensitivityTable


def trajectory_costs(
    policy: ModelPolicy,
    calibration: Calibration,
    table: SensitivityTable,
    *,
    probes: Probes = DEFAULT_PROBES,
    seed: int = 0,
    batch: int = 4,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> Float[np.ndarray, "e C n"]:
    """S of every trajectory, for the channels, options and quantizer of a table.

    Args:
        policy: the full-precision policy.
        calibration: the steps; its manifest's `datasets` and `episodes` give the trajectory of
            each.
        table: the table whose channels are costed, with its statistics.
        probes: number of Rademacher vectors, or "full".
        seed: of the probes.
        batch: frames at a time on each device.
        rules: those of the table; None takes those of the policy's layout.
        progress: called with the frames done.

    Returns:
        Trajectories in ascending order of their numbers; float64, 0 at 16 bits.

    Raises:
        InputError: the set does not say which trajectories its frames belong to, the table belongs
            to other layers, or a cost is not finite.
    """
    episodes: Sequence[int] | None = calibration.manifest.get("episodes")
    if episodes is None or len(episodes) != calibration.frames:
        raise InputError("the calibration set does not name the trajectory of each of its frames")
    layers = quantizable_layers(policy.model, policy.layout.rules if rules is None else rules)
    if tuple(layers) != table.index.paths:
        raise InputError("the table was made for other layers than this policy's")
    datasets = calibration.manifest.get("datasets", [0] * len(episodes))
    _, place = np.unique(np.stack([datasets, episodes]), axis=1, return_inverse=True)
    sums = np.zeros((place.max() + 1, *table.costs.shape))
    done = 0
    # A change of zero costs nothing, so 16 bits need no exception.
    sweep = Sweep(
        policy=policy,
        calibration=calibration,
        index=table.index,
        seed=seed,
        batch=batch,
        weights=table.action_weights,
        steps=table.executed_steps,
        progress=progress,
    )
    constants = layer_constants(layers, table.quantizer, table.bits)
    for costs in frame_costs(sweep, constants, probes=probes):
        check_finite(costs, first=done)
        for frame in costs:
            sums[place[done]] += frame
            done += 1
    return sums
