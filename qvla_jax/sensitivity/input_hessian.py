"""The proxy of QVLA's released code: weight error under the layer's input covariance.

AutoLab-SAI-SJTU/QVLA at 26cc482, restated from its recorded outputs. It does not involve actions.
For a layer with inputs x (all tokens weighted equally) and N inputs along the first axis of its
batches,

    H = (2 / N) sum x x^T,     H[j, j] = 1 for inputs that are always zero,
    U = upper Cholesky factor of (H + 0.01 mean(diag H) I)^-1,
    proxy[c, n] = sum_j (w - w_hat)[c, j]^2 / max(U[j, j]^2, 1e-12),

with w_hat on the release's own float32 grid and no bias correction. It exists for comparison; its
costs do not have the unit of the action error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import PRUNED, SOURCE
from qvla_jax.quantization.layers import weight_rows
from qvla_jax.sensitivity.replay import ReplaySpec, unperturbed
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sharding import replicate, to_host

_DAMPING = 0.01
_SCALE_FLOOR = 1e-6
_DIAGONAL_FLOOR = 1e-12


@functools.partial(jax.jit, static_argnums=0)
def _grams(
    spec: ReplaySpec, state: nnx.State, inputs: object, real: Array
) -> dict[str, Float[Array, "k k"]]:
    """The sum of x x^T over the real frames of a batch, for every layer."""
    _, seen = unperturbed(spec, state, inputs)
    grams = {}
    for path, x in seen.items():
        x = jnp.where(real[:, None, None], x, 0).astype(jnp.float32)
        grams[path] = jnp.einsum("btj,btk->jk", x, x, precision=jax.lax.Precision.HIGHEST)
    return grams


def input_hessians(sweep: Sweep) -> dict[str, Float[np.ndarray, "k k"]]:
    """H of each layer, float64; zeros for layers that no forward pass reaches.

    N counts frames. The release feeds one image at a time; a vision tower that sees v cameras
    together gets v times as large an H here, which scales all costs of its layers equally.

    Raises:
        InputError: the set is empty, or an input is NaN or infinite.
    """
    mesh, paths = sweep.mesh, sweep.index.paths
    graphdef, state = nnx.split(sweep.policy.model)
    state = replicate(mesh, state)
    spec = ReplaySpec(graphdef, paths, paths, mesh)
    sums = {layer.path: np.zeros((layer.fan_in,) * 2) for layer in sweep.index.layers}
    done, frames = 0, sweep.calibration.frames
    sweep.progress("input covariance", 0, frames)
    for item in sweep.batches():
        real = np.arange(len(item.frames)) < item.count
        for path, gram in _grams(spec, state, item.inputs, real).items():
            sums[path] += to_host(gram).astype(np.float64)
        done += item.count
        sweep.progress("input covariance", done, frames)
    for path, total in sums.items():
        if not np.isfinite(total).all():
            raise InputError(f"{path}: its inputs are NaN or infinite on the calibration set")
    return {path: 2.0 / done * total for path, total in sums.items()}


def inverse_factor_diagonal(hessian: Float[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    """Diagonal of U, the upper Cholesky factor of the damped inverse; in float64."""
    damped = hessian.astype(np.float64).copy()
    diagonal = np.diagonal(damped).copy()
    diagonal[diagonal == 0] = 1.0
    np.fill_diagonal(damped, diagonal + _DAMPING * diagonal.mean())
    inverse = scipy.linalg.cho_solve(
        (scipy.linalg.cholesky(damped, lower=True), True), np.eye(len(damped))
    )
    return np.diagonal(scipy.linalg.cholesky((inverse + inverse.T) / 2, lower=False))


def released_grid(weight: Float[np.ndarray, "c k"], bits: int) -> Float[np.ndarray, "c k"]:
    """w_hat as in the release: float32 scales, never below 1e-6."""
    if bits == SOURCE:
        return weight
    if bits == PRUNED:
        return np.zeros_like(weight)
    qmax = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.maximum(largest / qmax, np.float32(_SCALE_FLOOR))
    return np.clip(np.round(weight / scale), -qmax - 1, qmax) * scale


def proxy_costs(
    weight: Float[np.ndarray, "c k"],
    diagonal: Float[np.ndarray, " k"],
    bits: tuple[int, ...],
) -> Float[np.ndarray, "c n"]:
    """The proxy of every row of one layer under every option, float64."""
    weight = np.asarray(weight, np.float32)
    inverse = 1.0 / np.maximum(np.asarray(diagonal, np.float64) ** 2, _DIAGONAL_FLOOR)
    errors = [(weight - released_grid(weight, b)).astype(np.float64) for b in bits]
    return np.stack([e**2 @ inverse for e in errors], axis=1)


def input_hessian_costs(sweep: Sweep) -> Float[np.ndarray, "C n"]:
    """The proxy of all channels; the sweep's quantizer is not used."""
    hessians = input_hessians(sweep)
    costs = np.zeros((len(sweep.index), len(sweep.bits)))
    for layer, rows in sweep.index.items():
        diagonal = inverse_factor_diagonal(hessians[layer.path])
        costs[rows] = proxy_costs(weight_rows(sweep.layers[layer.path]), diagonal, sweep.bits)
    return costs
