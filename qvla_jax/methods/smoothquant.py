"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) with qwix's scales.

Equation 4: s_i = max|x_i|^alpha / max|w_i|^(1 - alpha) moves the range of activations into weights;
rows are rounded as w s, and the layer's inputs, multiplied by m = 1 / s (stored in bfloat16), are
rounded token by token when the policy runs. All layers share one alpha: the one of `ALPHAS` with
the smallest squared error of the action on calibration frames.
"""

import dataclasses
from typing import Final

import jax.numpy as jnp
import numpy as np
from qwix.contrib import smooth_quant

from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.moments import InputMoments
from qvla_jax.methods.numerics import nearest_scaled, qwix_context
from qvla_jax.methods.packing import layer_by_layer
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.rows import QuantizedRows
from qvla_jax.sensitivity.batches import FirstFrames

ALPHAS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# The published code's lower bound for a weight's range.
_FLOOR: Final = 1e-5
# Frames that decide alpha, and how many of them form a batch.
_FRAMES, _BATCH = 32, 8


def smoothing_scales(
    weight: Float[Array, "c k"], largest: Float[np.ndarray, " k"], alpha: float
) -> Float[np.ndarray, " k"]:
    """Equation 4.

    Args:
        weight: source rows.
        largest: largest |x_i| over the calibration tokens. An input that is always zero keeps its
            range: it has none to move, and its multiplier would be unbounded.
        alpha: share of the range that moves.
    """
    ranges = jnp.maximum(jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=0), _FLOOR)
    with qwix_context():
        scales = smooth_quant.compute_scales_ratio(
            jnp.asarray(largest, jnp.float32), ranges, alpha=alpha
        )
    return np.where(largest > 0, np.asarray(scales), np.float32(1))


def smoothquant(
    weight: Float[Array, "c k"],
    largest: Float[np.ndarray, " k"],
    alpha: float,
    bits: int,
    group: int | None = None,
) -> QuantizedRows:
    """Codes, scales and input scale of rows [c, k].

    Args:
        weight: source rows.
        largest: as in `smoothing_scales`.
        alpha: as there.
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; None: the whole row.
    """
    return nearest_scaled(weight, 1 / smoothing_scales(weight, largest, alpha), bits, group)


def smoothquant_policy(measured: Measurements, setting: Setting) -> Policy:
    """The packed policy at the alpha with the smallest squared error of the action."""
    calibration = measured.calibration
    frames = FirstFrames(calibration, min(_FRAMES, calibration.frames))
    batches = list(frames.batches(_BATCH))

    def actions(policy: Policy) -> Float[np.ndarray, "b h a"]:
        return np.concatenate([policy.infer_normalized(batch) for batch in batches])

    expected = actions(measured.policy)
    best: tuple[float, float, Policy] | None = None
    errors = {}
    for alpha in ALPHAS:

        def rows(
            weight: Float[Array, "c k"],
            moments: InputMoments,
            bits: int,
            group: int | None,
            alpha: float = alpha,
        ) -> QuantizedRows:
            return smoothquant(weight, moments.largest, alpha, bits, group)

        packed = layer_by_layer(measured, setting, rows)
        found = actions(unpacked(measured.policy, packed))
        errors[f"{alpha:g}"] = error = float(np.mean((found - expected) ** 2))
        if best is None or error < best[0]:
            best = error, alpha, packed
    assert best is not None
    header = {**(best[2].quantization or {}), "alpha": best[1], "alpha errors": errors}
    return dataclasses.replace(best[2], quantization=header)
