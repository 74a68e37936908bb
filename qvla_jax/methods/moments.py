"""Statistics of every quantized layer's inputs, gathered by a qwix calibration provider.

The provider intercepts each `dot_general` of the NNX model as qwix's own calibration providers do,
and takes GPTQ's Hessian, AWQ's mean magnitude and SmoothQuant's largest magnitude in one pass over
the calibration frames. As in the published implementations, all tokens count equally, including
padded prompt tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from qwix.contrib import awq_core, calibration, gptq_core

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.methods.numerics import qwix_context
from qvla_jax.models.surgery import path_string
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.sensitivity.batches import Calibration, ModelPolicy

_SUFFIX: Final = "_moments"


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """Of one layer's inputs x over all calibration tokens."""

    # Sum of x x^T.
    hessian: Float[np.ndarray, "k k"]
    # Mean of |x_i|.
    mean_magnitude: Float[np.ndarray, " k"]
    # Largest |x_i|.
    largest: Float[np.ndarray, " k"]


class _Moments(calibration.SinglePassCalibrationProvider):
    """Takes the statistics of all methods at once; quantizes nothing."""

    def get_rule_type(self) -> type[qwix.QuantizationRule]:
        """Any rule."""
        return qwix.QuantizationRule

    def get_stats_suffix(self) -> str:
        """The suffix of the weight's name."""
        return _SUFFIX

    def compute_stats(self, lhs: Float[Array, "k t"]) -> dict[str, Any]:
        """Statistics of one call's inputs, tokens last."""
        return {
            "hessian": gptq_core.compute_hessian(lhs),
            "mean": awq_core.compute_act_scale(lhs, axis=1),
            "largest": jnp.max(jnp.abs(lhs), axis=1),
        }


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef: nnx.GraphDef[Any], state: Any, inputs: Any) -> dict[str, dict[str, Array]]:
    """Statistics of one batch, by layer."""
    model: Any = nnx.merge(graphdef, state)
    with jax.default_matmul_precision("float32"):
        model(inputs)
    found = {}
    for path, variable in nnx.state(model).flat_state():
        if str(path[-1]).endswith(_SUFFIX):
            found[path_string(path[:-1])] = dict(variable.get_value())
    return found


def input_moments(
    policy: ModelPolicy,
    frames: Calibration,
    index: ChannelIndex,
    *,
    batch: int = 8,
    progress: Progress = no_progress,
) -> Mapping[str, InputMoments]:
    """Moments of the inputs of each layer that the forward pass reaches, by path.

    Args:
        policy: has `model` and `prepare`.
        frames: the calibration set.
        index: the quantized layers.
        batch: frames at a time.
        progress: called with the frames done.

    Raises:
        InputError: the set is empty, a layer runs several times in a call, or an input is NaN or
            infinite.
    """
    paths = "|".join(re.escape(path.replace(".", "/")) for path in index.paths)
    # The width is not used, but a rule without one matches nothing.
    provider = _Moments([qwix.QuantizationRule(module_path=paths, weight_qtype=jnp.int8)])
    with qwix_context():
        model = qwix.quantize_model(policy.model, provider, skip_nnx_init=True)
    graphdef, state = nnx.split(model)
    sums: dict[str, np.ndarray] = {}
    means: dict[str, np.ndarray] = {}
    largest: dict[str, np.ndarray] = {}
    done = 0
    progress("input moments", 0, frames.frames)
    for observations in frames.batches(batch):
        inputs = policy.complete(jax.tree.map(jnp.asarray, policy.prepare(observations)))
        count = len(jax.tree.leaves(inputs)[0])
        with qwix_context():
            found = jax.device_get(_step(graphdef, state, inputs))
        for path, own in found.items():
            if own["count"] > 1:  # qwix adds up where a maximum is wanted
                raise InputError(
                    f"{path}: runs several times in a call of the policy; methods that read input "
                    "moments know layers that run once: exclude it"
                )
            hessian = np.asarray(own["sum_of_hessian"], np.float64)
            sums[path] = sums.get(path, 0.0) + hessian
            means[path] = means.get(path, 0.0) + count * np.asarray(own["sum_of_mean"], np.float64)
            magnitude = np.asarray(own["sum_of_largest"])
            largest[path] = np.maximum(largest.get(path, magnitude), magnitude)
        done += count
        progress("input moments", done, frames.frames)
    if not done:
        raise InputError("the calibration set holds no frames")
    for path, hessian in sums.items():
        if not np.isfinite(hessian).all():
            raise InputError(f"{path}: its inputs are NaN or infinite on the calibration set")
    return {p: InputMoments(sums[p], means[p] / done, largest[p]) for p in sums}
