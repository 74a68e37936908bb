"""Mean and covariance of every quantized layer's inputs over the calibration set, in one pass.

Only tokens that can change the action count: padding never does, and after the last attention of
the language model only the action placeholders do. A token counts if the cotangent of a random
projection of the action is not zero there, which costs one reverse pass. If all tokens of a layer
matter, these are the plain moments over frames and tokens.

`weighting="action"` weighs by how much the action depends on the layer's outputs. With J the
derivative of the action with respect to them, the action's first-order change when row c and its
bias change by dw and db is sum_t J[t, c] (x_t . dw + db), and its mean square, averaged over rows,

    (dw, db) H (dw, db)^T,     H = E_x E_v mean_c z_c z_c^T,     z_c = sum_t (J^T v)[t, c] (x_t, 1),

for probes v with E[v v^T] = I: the Gauss-Newton matrix of the action's error in a row, one for all
rows of the layer. Error feedback with this matrix lets rounding errors cancel where they affect the
action, across tokens too; its mean gives the bias correction with the smallest action error.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.statistics import InputStatistics, Weighting
from qvla_jax.sensitivity.batches import Calibration, ModelPolicy
from qvla_jax.sensitivity.reverse import (
    Contraction,
    FromCotangent,
    Probed,
    ReverseSpec,
    reverse_sweep,
)
from qvla_jax.sensitivity.stages import stage_paths
from qvla_jax.sensitivity.streaming import streamed_sweep
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sharding import one_device_mesh, replicate, sweep_mesh, to_host

# Variances up to this share of the second moment are rounding errors of its sums in float32.
_ROUNDING: Final = 8 * float(np.finfo(np.float32).eps)


def _moments_where_it_matters(x: Float[Array, "b T k"], constants: None) -> FromCotangent:
    """Per frame: sums of x x^T, of x and of 1 over the tokens that matter, as one matrix."""
    del constants
    extended = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b k+1 k+1"]:
        matters = jnp.any(g != 0, axis=-1, keepdims=True)
        kept = jnp.where(matters, extended, 0)
        return jnp.matmul(jnp.swapaxes(kept, 1, 2), kept, precision=jax.lax.Precision.HIGHEST)

    return of_cotangent


def _moments_by_action(x: Float[Array, "b T k"], constants: None) -> FromCotangent:
    """Per frame and probe: sum over the rows c of z_c z_c^T, each z_c a sum over tokens."""
    del constants
    extended = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b k+1 k+1"]:
        rows = jnp.matmul(jnp.swapaxes(g, 1, 2), extended, precision=jax.lax.Precision.HIGHEST)
        return jnp.matmul(jnp.swapaxes(rows, 1, 2), rows, precision=jax.lax.Precision.HIGHEST)

    return of_cotangent


# Contraction and probes of each weighting.
_CONTRACTIONS: Final[Mapping[Weighting, tuple[Contraction, int]]] = {
    "tokens": (_moments_where_it_matters, 1),
    "action": (_moments_by_action, 8),
}


def _sums_where_it_matters(x: Float[Array, "b T k"], constants: None) -> FromCotangent:
    """Per frame: sums of x and of 1 over the tokens that matter, side by side."""
    del constants
    extended = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b k+1"]:
        return jnp.sum(extended, axis=1, where=jnp.any(g != 0, axis=-1, keepdims=True))

    return of_cotangent


def input_statistics(
    policy: ModelPolicy,
    calibration: Calibration,
    index: ChannelIndex,
    *,
    weighting: Weighting = "tokens",
    batch: int = 4,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
) -> InputStatistics:
    """Moments of each layer's inputs over the calibration set's frames and tokens.

    Args:
        policy: has `model` and `prepare`.
        calibration: the frames.
        index: the quantized layers.
        weighting: "tokens" weighs all tokens that matter equally; "action" is described in the
            module.
        batch: frames at a time on each device; each holds a matrix [k + 1, k + 1] for every layer.
        seed: seed of the projections of the action.
        mesh: from `sharding.sweep_mesh`, which is also the default.
        progress: called with the frames done.

    Returns:
        Means and covariances in float64; zeros for a layer that no action depends on. Layers with
        equal statistics share their arrays.

    Raises:
        InputError: the set is empty, or an input is NaN or infinite.
    """
    sweep = Sweep(
        policy=policy,
        calibration=calibration,
        index=index,
        seed=seed,
        batch=batch,
        mesh=sweep_mesh() if mesh is None else mesh,
        progress=progress,
    )
    graphdef, state = nnx.split(policy.model)
    contraction, probes = _CONTRACTIONS[weighting]
    # One probe at a time, because the matrices take the memory.
    spec = ReverseSpec(graphdef, index.paths, contraction, probes, sweep.mesh, block=1)
    totals = {layer.path: np.zeros((layer.fan_in + 1,) * 2) for layer in index.layers}
    _add_up(sweep, functools.partial(reverse_sweep, spec, replicate(sweep.mesh, state), {}), totals)
    means: dict[str, np.ndarray] = {}
    covariances: dict[str, np.ndarray] = {}
    last: str | None = None
    for path, total in totals.items():
        if last is not None and np.array_equal(total, totals[last]):
            means[path], covariances[path] = means[last], covariances[last]
            continue
        count = total[-1, -1] if total[-1, -1] > 0 else 1.0
        mean, second = total[-1, :-1] / count, total[:-1, :-1] / count
        covariance = second - np.outer(mean, mean)
        if (np.diagonal(covariance) <= _ROUNDING * np.diagonal(second)).all():
            # The input is constant, such as a learned vector: the rest is rounding.
            covariance = np.zeros_like(covariance)
        means[path], covariances[path] = mean, covariance
        last = path
    return InputStatistics(means, covariances, _made_from(calibration, seed), weighting)


def streamed_means(
    policy: ModelPolicy,
    calibration: Calibration,
    index: ChannelIndex,
    *,
    batch: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> InputStatistics:
    """The means of `input_statistics`, moving weights to one device a stage at a time.

    Args:
        policy: its weights may be on the host or in files.
        calibration: the frames.
        index: the quantized layers.
        batch: frames at a time.
        seed: seed of the projection that determines which tokens matter.
        progress: called with the frames done.

    Returns:
        Means in float64, without covariances.

    Raises:
        InputError: see `input_statistics`; or a layer is part of no stage.
    """
    sweep = Sweep(
        policy=policy,
        calibration=calibration,
        index=index,
        seed=seed,
        batch=batch,
        mesh=one_device_mesh(),
        progress=progress,
    )
    graphdef, state = nnx.split(policy.model)
    spec = ReverseSpec(graphdef, index.paths, _sums_where_it_matters, 1, sweep.mesh)
    totals = {layer.path: np.zeros(layer.fan_in + 1) for layer in index.layers}
    stages = stage_paths(policy.model, policy.layout)
    _add_up(sweep, functools.partial(streamed_sweep, spec, stages, state, {}), totals)
    means = {path: total[:-1] / max(total[-1], 1.0) for path, total in totals.items()}
    return InputStatistics(means, made_from=_made_from(calibration, seed))


def _add_up(
    sweep: Sweep,
    pull_back: Callable[[Probed], dict[str, Array]],
    totals: dict[str, np.ndarray],
) -> None:
    """Adds the results for every frame to the layers' totals.

    Raises:
        InputError: see `input_statistics`.
    """
    done, frames = 0, sweep.calibration.frames
    sweep.progress("input statistics", 0, frames)
    for item in sweep.batches():
        sums = pull_back(Probed(item.inputs, item.frames, jax.random.key(sweep.seed)))
        for path, values in sums.items():
            # One after another, so that the batch size does not change the order of summation.
            for frame in to_host(values)[: item.count]:
                totals[path] += frame
        done += item.count
        sweep.progress("input statistics", done, frames)
    for path, total in totals.items():
        if not np.isfinite(total).all():
            raise InputError(f"{path}: its inputs are NaN or infinite on the calibration set")


def _made_from(calibration: Calibration, seed: int) -> dict[str, Any]:
    return {"calibration": calibration.manifest["sha256"], "seed": seed}
