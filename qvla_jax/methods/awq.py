"""AWQ (Lin et al. 2024, arXiv 2306.00978) by qwix's `awq_core`.

Inputs that are large on average get more of the grid: rows are rounded as w s with s_i a power of
the mean magnitude of input i, normalized; the power is searched on a grid of 20 values from 0 to 1
for the smallest error of the rows weighted by these magnitudes. The layer's inputs are multiplied
by 1 / s, which is stored in bfloat16. The published code also searches clips; qwix does not.
"""

import jax.numpy as jnp
import numpy as np
from qwix.contrib import awq_core

from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.policy import Policy
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.numerics import (
    effective_group,
    how_to_quantize,
    nearest_scaled,
    padded,
    qwix_context,
)
from qvla_jax.methods.packing import layer_by_layer
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.rows import QuantizedRows


def awq(
    weight: Float[Array, "c k"],
    mean_magnitude: Float[np.ndarray, " k"],
    bits: int,
    group: int | None = None,
) -> QuantizedRows:
    """Codes, scales and input scale of rows [c, k].

    Args:
        weight: source rows.
        mean_magnitude: mean of |x_i| over the calibration tokens.
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; None: the whole row.
    """
    fan_in = weight.shape[1]
    own = effective_group(fan_in, group)
    rows = padded(weight, own)
    # A padded input counts as an average one: it must not influence the normalization.
    magnitude = np.full(rows.shape[1], float(np.mean(mean_magnitude)), np.float32)
    magnitude[:fan_in] = mean_magnitude
    with qwix_context():
        scales = awq_core.search_optimal_scales(
            rows, jnp.asarray(magnitude), how_to_quantize(bits, own)
        )
    return nearest_scaled(weight, 1 / np.asarray(scales)[0, :fan_in], bits, group)


def awq_policy(measured: Measurements, setting: Setting) -> Policy:
    """The packed policy."""
    return layer_by_layer(
        measured, setting, lambda weight, m, bits, group: awq(weight, m.mean_magnitude, bits, group)
    )
