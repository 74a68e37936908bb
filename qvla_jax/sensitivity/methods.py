"""`sensitivities`: all methods behind one signature."""

import dataclasses
from typing import Any, Final

import numpy as np
from jax.sharding import Mesh

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError, unknown
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance
from qvla_jax.quantization.codes import BITS, SOURCE
from qvla_jax.quantization.layers import LayerRules
from qvla_jax.quantization.layout import option_sizes
from qvla_jax.quantization.quantizer import Quantizer, QuantizerSettings
from qvla_jax.quantization.statistics import InputStatistics
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.input_hessian import input_hessian_costs
from qvla_jax.sensitivity.jacobian import (
    CONTRACTIONS,
    frame_costs,
    layer_constants,
    streamed_frame_costs,
)
from qvla_jax.sensitivity.joint import joint_factors
from qvla_jax.sensitivity.probes import Probes, check_probes
from qvla_jax.sensitivity.refined import refined_costs
from qvla_jax.sensitivity.statistics import input_statistics, streamed_means
from qvla_jax.sensitivity.store import SweepStore, digest_of
from qvla_jax.sensitivity.sweep import DEFAULT_MEMORY, Sweep
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.sharding import sweep_mesh

ESTIMATORS: Final = ("jacobian", "refined", "exact", "taylor", "input_hessian")
DEFAULT_BITS: Final = (0, 2, 4, 8, 16)
DEFAULT_SHARE: Final = 0.01
DEFAULT_QUANTIZER: Final = QuantizerSettings()


@in_32_bits
def sensitivities(
    policy: Policy,
    calibration: Calibration,
    *,
    method: str = "jacobian",
    bits: tuple[int, ...] = DEFAULT_BITS,
    probes: Probes = 8,
    exact_share: float = DEFAULT_SHARE,
    seed: int = 0,
    batch: int | None = None,
    memory: int = DEFAULT_MEMORY,
    action_weights: np.ndarray | None = None,
    executed_steps: int | None = None,
    quantizer: QuantizerSettings = DEFAULT_QUANTIZER,
    statistics: InputStatistics | None = None,
    joint: bool = True,
    rules: LayerRules | None = None,
    mesh: Mesh | None = None,
    split_weights: bool = False,
    streamed: bool = False,
    store: SweepStore | None = None,
    progress: Progress = no_progress,
) -> SensitivityTable:
    """What each output channel of each quantized layer costs under each option.

    >>> import qvla_jax
    >>> policy = qvla_jax.random_policy("tiny-test")
    >>> frames = qvla_jax.calibration_set("bundled", frames=2)
    >>> table = qvla_jax.sensitivities(policy, frames)
    >>> table.costs.shape == (len(table.index), len(table.bits))  # a row for each channel
    True
    >>> table.bits
    (0, 2, 4, 8, 16)
    >>> float(table.costs[:, 4].max())  # 16 bits leave a channel as it is
    0.0

    Args:
        policy: the full-precision policy.
        calibration: frames to average over.
        method: "jacobian" (first order, all channels at once), "exact" (one forward pass for each
            channel and option), "refined" (first order, corrected by exact probing where it is
            least certain), "taylor" and "input_hessian" (proxies for comparison). The modules of
            these names have the equations.
        bits: options, out of 0, 2, 3, 4, 8, 16.
        probes: Rademacher vectors for each frame, or "full" for all basis vectors of the steps
            that count (jacobian, refined and taylor).
        exact_share: forward passes that `refined` may take, as a share of those of `exact`.
        seed: of the probes.
        batch: frames at a time on each device; memory grows with it.
        memory: bytes on each device for simultaneous perturbations in exact probing.
        action_weights: weight of each of the a action dimensions; None weighs those equally that
            the robot executes.
        executed_steps: actions of a chunk that count, from the first; None takes those that the
            robot executes before it asks again (`Layout.executed_steps`).
        quantizer: grid, rounding and bias correction of the quantizer to cost, which `quantize`
            then uses; `input_hessian` costs that of the released code.
        statistics: from `input_statistics` on the same set, if already known; None measures them in
            a separate pass.
        joint: also measure by how much joint errors exceed the sum of single ones
            (sensitivity.joint); not for input_hessian, whose costs have another unit.
        rules: which layers are quantized; None takes those of the policy's layout.
        mesh: from `sharding.sweep_mesh`; None puts the devices of all processes along `data`. Every
            process calls this function with the same arguments and gets the same table.
        split_weights: jacobian, refined and taylor split the policy's weights over the mesh's
            `channel` axis, for weights that do not fit on one device.
        streamed: jacobian and taylor move the weights to one device a stage at a time, for policies
            with `load_policy(..., mapped=True)` that do not fit in memory. Excludes joint factors
            and error feedback, which need more than the means of the inputs.
        store: keeps finished items, so that a killed sweep resumes where it stopped.
        progress: reports progress.

    Returns:
        Costs in squared normalized action units (except for input_hessian), with sizes in bytes.

    Raises:
        InputError: unknown method or option, unusable weights, steps or probes, a weight or an
            activation that is NaN or infinite (weights are named by layer and channel), an empty
            set.
    """
    if method not in ESTIMATORS:
        raise InputError(unknown("estimator", method, ESTIMATORS))
    bits = _check_bits(bits)
    check_probes(probes)
    weights = _check_weights(action_weights, policy)
    steps = _check_steps(executed_steps, policy)
    index = policy_index(policy, rules)
    if streamed:
        _check_streamed(policy, method, quantizer, joint)
    if statistics is None and quantizer.needs_statistics:
        if streamed:
            statistics = streamed_means(
                policy, calibration, index, batch=batch or 1, seed=seed, progress=progress
            )
        else:
            statistics = input_statistics(
                policy,
                calibration,
                index,
                weighting=quantizer.weighting,
                seed=seed,
                mesh=mesh,
                progress=progress,
            )
    bound = Quantizer(quantizer, statistics)
    bound.check(index)
    options = tuple(b for b in bits if b != SOURCE)
    made_with = {**provenance(seed=seed), "policy": policy.fingerprint}
    if store is not None:
        store = store.knowing(
            **made_with, quantizer=dataclasses.asdict(quantizer), statistics=_digest(statistics)
        )
    sweep = Sweep(
        policy=policy,
        calibration=calibration,
        index=index,
        quantizer=bound,
        bits=options,
        seed=seed,
        batch=batch or (1 if streamed else 4),
        memory=memory,
        weights=weights,
        steps=steps,
        mesh=sweep_mesh() if mesh is None else mesh,
        split_weights=split_weights,
        store=store,
        progress=progress,
    )
    costs, error = _costs(sweep, method, probes=probes, share=exact_share, streamed=streamed)
    columns = [options.index(b) if b != SOURCE else len(options) for b in bits]

    def with_source(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, 1)))[:, columns]

    settings: dict[str, Any] = {
        "probes": probes if method in ("jacobian", "refined", "taylor") else None,
        "exact_share": exact_share if method == "refined" else None,
        "frames": calibration.frames,
        "action_weights": None if weights is None else weights.tolist(),
        "executed_steps": steps,
    }
    table = SensitivityTable(
        costs=with_source(costs),
        sizes=option_sizes(index, bits, bias_correction=quantizer.bias_correction),
        bits=bits,
        index=index,
        method=method,
        settings=quantizer,
        reads=tuple(policy.layout.reads_of(path) for path in index.paths),
        standard_error=None if error is None else with_source(error),
        statistics=statistics,
        provenance={
            **made_with,
            "calibration": calibration.manifest["sha256"],
            "settings": settings,
        },
    )
    if not joint or method == "input_hessian":
        return table
    factors = joint_factors(policy, calibration, table, rules=rules, progress=progress)
    return dataclasses.replace(table, joint=factors)


def _costs(
    sweep: Sweep, method: str, *, probes: Probes, share: float, streamed: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    if streamed:
        return mean_over_frames(streamed_frame_costs(sweep, method=method, probes=probes))
    if method == "input_hessian":
        return input_hessian_costs(sweep), None
    if method == "exact":
        return exact_costs(sweep)
    if method == "refined":
        return refined_costs(sweep, probes=probes, share=share)
    sweep.progress("rounded rows", 0, 1)
    constants = layer_constants(sweep.layers, sweep.quantizer, sweep.bits)
    sweep.progress("rounded rows", 1, 1)
    return mean_over_frames(frame_costs(sweep, constants, method=method, probes=probes))


def _check_streamed(policy: Policy, method: str, quantizer: QuantizerSettings, joint: bool) -> None:
    """Checks what a streamed sweep supports, before anything is measured."""
    if method not in CONTRACTIONS:
        raise InputError(f"streamed sweeps know {' and '.join(CONTRACTIONS)}, not {method}")
    if policy.decodes:
        raise InputError(
            f"streamed sweeps serve policies with a regression head; {policy.config.name} decodes "
            "tokens, for which its weights have to be in memory"
        )
    if quantizer.rounding != "nearest" or quantizer.weighting != "tokens" or joint:
        raise InputError(
            "streamed sweeps measure means of the inputs only: pass joint=False and a quantizer "
            'with rounding="nearest"'
        )


def _digest(statistics: InputStatistics | None) -> str | None:
    if statistics is None:
        return None
    arrays = (*statistics.means.values(), *statistics.covariances.values())
    return digest_of(*(np.asarray(array) for array in arrays))


def _check_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    bits = tuple(int(b) for b in bits)
    if len(set(bits)) != len(bits) or not set(bits) <= set(BITS) or set(bits) <= {SOURCE}:
        raise InputError(f"bits: expected distinct options out of {BITS} below 16, got {bits}")
    return bits


def _check_weights(weights: np.ndarray | None, policy: Policy) -> np.ndarray | None:
    """Weights of the action dimensions, or None if all count equally."""
    dimensions = policy.config.action_dim
    if weights is None:
        return counted_weights(policy)
    weights = np.asarray(weights, np.float32)
    if weights.shape != (dimensions,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(
            f"action_weights: expected {dimensions} finite numbers, none negative, got {weights}"
        )
    return weights


def counted_weights(policy: Policy) -> Float[np.ndarray, " a"] | None:
    """Weights that count the entries of an action that the robot executes; None: all."""
    own = policy.layout.action_weights({}, policy.config.action_dim)
    return None if all(own) else np.asarray(own, np.float32)


def _check_steps(steps: int | None, policy: Policy) -> int | None:
    """Actions of a chunk that count, or None if all do."""
    if steps is None:
        return policy.layout.executed_steps
    horizon = policy.config.action_horizon
    if type(steps) is not int or not 1 <= steps <= horizon:
        raise InputError(
            f"executed_steps: expected a whole number from 1 to {horizon}, got {steps!r}"
        )
    return None if steps == horizon else steps
