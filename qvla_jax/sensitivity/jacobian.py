"""First-order sensitivities of all channels from s reverse passes (DESIGN.md section 4).

Quantizing row c of a layer changes its output by dY[t, c] = (x_t - E[x]) . (w_hat - w)_c, the
quantizer's bias correction included. To first order the action changes by
dA = sum_t J[t, c] dY[t, c], J being the derivative of the action with respect to the layer's
output. For a probe v with E[v v^T] = I

    S[c, n] = E_x || dA ||^2 = E_x E_v ( sum_t g[t, c] dY[t, c, n] )^2,     g = J^T v,

so that one reverse pass per probe and one matrix product per bit-width serve all channels. With
the h a basis vectors as probes the expectation over v is exact.

`taylor` is the isotropic proxy of QVLA (arXiv 2602.03782), || J ||_F^2 || w_hat - w ||^2 =
E_v sum_t g[t, c]^2 || w_hat - w ||^2, which knows nothing of the inputs.
"""

from collections.abc import Mapping
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.quantizer import Quantizer
from qvla_jax.sensitivity.accumulate import FrameMean
from qvla_jax.sensitivity.batches import Calibration, ModelPolicy, batch_size, frame_batches
from qvla_jax.sensitivity.probes import Probes, check_probes
from qvla_jax.sensitivity.reverse import Contraction, FromCotangent, ReverseSpec, reverse_sweep
from qvla_jax.sharding import data_mesh, replicate


class LayerConstants(TypedDict):
    """A layer's arrays: the change of every row under every option, and the mean input."""

    changes: Float[Array, "n c k"]
    mean: Float[Array, " k"]


def action_change(x: Float[Array, "b T k"], constants: LayerConstants) -> FromCotangent:
    """The `jacobian` contraction: squared first-order change of v . A, [b, n, c]."""
    changes = constants["changes"]
    options, channels, fan_in = changes.shape
    centred = x - constants["mean"][None, None]
    dy = jnp.matmul(
        centred, changes.reshape(-1, fan_in).T, precision=jax.lax.Precision.HIGHEST
    ).reshape(*x.shape[:2], options, channels)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b n c"]:
        return jnp.square(jnp.sum(g[:, :, None] * dy, axis=1))

    return of_cotangent


def isotropic_change(x: Float[Array, "b T k"], constants: LayerConstants) -> FromCotangent:
    """The `taylor` contraction: || J ||_F^2 || dw ||^2, [b, n, c]."""
    del x
    norms = jnp.sum(jnp.square(constants["changes"]), axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b n c"]:
        return jnp.sum(jnp.square(g), axis=1)[:, None] * norms[None]

    return of_cotangent


CONTRACTIONS: dict[str, Contraction] = {"jacobian": action_change, "taylor": isotropic_change}


def reverse_costs(
    policy: ModelPolicy,
    calibration: Calibration,
    layers: Mapping[str, nnx.Linear],
    index: ChannelIndex,
    quantizer: Quantizer,
    *,
    method: str,
    bits: tuple[int, ...],
    probes: Probes,
    seed: int = 0,
    batch: int = 8,
    weights: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> tuple[Float[np.ndarray, "C n"], Float[np.ndarray, "C n"]]:
    """Sensitivities of every channel for every one of `bits`, and their standard errors.

    Args:
        policy: the full-precision policy.
        calibration: frames x.
        layers: path -> layer in the order of `index`.
        index: the channels.
        quantizer: the one whose changes are costed.
        method: "jacobian" or "taylor".
        bits: options, without 16.
        probes: number of Rademacher vectors, or "full".
        seed: of the probes.
        batch: frames at a time; memory grows with it.
        weights: weight of each action dimension.
        progress: called with the frames done.

    Returns:
        Mean over frames and its standard error, float64. Zero for layers that no action reads.

    Raises:
        InputError: `probes` is unusable, the set is empty, or a cost is not finite.
    """
    constants = {
        path: LayerConstants(
            changes=quantizer.row_changes(path, layer.kernel[...].T, bits),
            mean=_shift(quantizer, path, layer.kernel.shape[0]),
        )
        for path, layer in layers.items()
    }
    return change_costs(
        policy,
        calibration,
        index,
        constants,
        method=method,
        probes=probes,
        seed=seed,
        batch=batch,
        weights=weights,
        progress=progress,
    )


def change_costs(
    policy: ModelPolicy,
    calibration: Calibration,
    index: ChannelIndex,
    constants: Mapping[str, LayerConstants],
    *,
    method: str = "jacobian",
    probes: Probes = 8,
    seed: int = 0,
    batch: int = 8,
    weights: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> tuple[Float[np.ndarray, "C n"], Float[np.ndarray, "C n"]]:
    """What given changes of every row cost at a policy, which may be quantized already.

    Args:
        policy: where the derivatives are taken.
        calibration: frames x.
        index: the channels.
        constants: path -> changes of the rows and mean input, in the order of `index`.
        method: "jacobian" or "taylor".
        probes: number of Rademacher vectors, or "full".
        seed: of the probes.
        batch: frames at a time; memory grows with it.
        weights: weight of each action dimension.
        progress: called with the frames done.

    Returns:
        Mean over frames and its standard error, float64. Zero for layers that no action reads.

    Raises:
        InputError: `probes` is unusable, the set is empty, or a cost is not finite.
    """
    check_probes(probes)
    mesh = data_mesh()
    graphdef, state = nnx.split(policy.model)
    spec = ReverseSpec(graphdef, tuple(constants), CONTRACTIONS[method], probes, mesh)
    options = len(next(iter(constants.values()))["changes"])
    state, constants = replicate(mesh, (state, dict(constants)))
    action_weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    result = FrameMean()
    size = batch_size(calibration.frames, batch, mesh)
    progress("sensitivity", 0, calibration.frames)
    for item in frame_batches(policy, calibration, size, mesh):
        costs = reverse_sweep(
            spec, state, constants, item.inputs, item.frames, jax.random.key(seed), action_weights
        )
        frames = np.zeros((item.count, len(index), options), np.float32)
        for layer, rows in index.items():
            if layer.path in costs:
                frames[:, rows] = np.swapaxes(np.asarray(costs[layer.path])[: item.count], 1, 2)
        result.add(frames)
        progress("sensitivity", result.frames, calibration.frames)
    return result.mean, result.standard_error


def _shift(quantizer: Quantizer, path: str, fan_in: int) -> Float[Array, " k"]:
    """E[x] where biases are corrected, zeros where they are not."""
    mean = quantizer.mean(path)
    return jnp.zeros(fan_in, jnp.float32) if mean is None else jnp.asarray(mean, jnp.float32)
