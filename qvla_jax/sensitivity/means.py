"""E[X]: the mean input of every quantized layer over the calibration set, in one streaming pass.

Only tokens that can change the action count: padding never does, and after the last attention of
the language model only the action placeholders do. A token counts if the cotangent of a random
projection of the action is not zero there, which costs one reverse pass. For a layer all of whose
tokens matter this is the plain mean over frames and tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.sensitivity.batches import Calibration, ModelPolicy, batch_size, frame_batches
from qvla_jax.sensitivity.reverse import FromCotangent, ReverseSpec, reverse_sweep
from qvla_jax.sharding import data_mesh


def _sum_where_it_matters(x: Float[Array, "b T k"], constants: None) -> FromCotangent:
    """Per frame: the sum of the inputs of tokens that matter, and their number at the end."""
    del constants
    extended = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b k+1"]:
        matters = jnp.any(g != 0, axis=-1, keepdims=True)
        return jnp.sum(jnp.where(matters, extended, 0), axis=1)

    return of_cotangent


def input_means(
    policy: ModelPolicy,
    calibration: Calibration,
    index: ChannelIndex,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Float[np.ndarray, " k"]]:
    """Mean input of each layer over the calibration set's frames and tokens.

    Args:
        policy: has `model` and `prepare`.
        calibration: the frames.
        index: the quantized layers.
        batch: frames at a time.
        seed: of the projection that finds out which tokens matter.
        progress: called with the frames done.

    Returns:
        Path -> float64 [k]. Zeros for a layer that no action depends on.

    Raises:
        InputError: the set is empty, or an input is NaN or infinite.
    """
    mesh = data_mesh()
    graphdef, state = nnx.split(policy.model)
    spec = ReverseSpec(graphdef, index.paths, _sum_where_it_matters, 1, mesh)
    totals = {layer.path: np.zeros(layer.fan_in + 1) for layer in index.layers}
    size, done = batch_size(calibration.frames, batch, mesh), 0
    progress("mean inputs", 0, calibration.frames)
    for item in frame_batches(policy, calibration, size, mesh):
        sums = reverse_sweep(spec, state, {}, item.inputs, item.frames, jax.random.key(seed), None)
        for path, values in sums.items():
            for frame in np.asarray(values)[: item.count].astype(np.float64):
                totals[path] += frame
        done += item.count
        progress("mean inputs", done, calibration.frames)
    for path, total in totals.items():
        if not np.isfinite(total).all():
            raise InputError(f"{path}: its inputs are NaN or infinite on the calibration set")
    return {path: total[:-1] / max(total[-1], 1.0) for path, total in totals.items()}
