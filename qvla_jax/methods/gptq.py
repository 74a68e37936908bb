"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) by qwix's `gptq_core`.

Inputs are rounded in their original order; the rounding error of each moves into the remaining ones
through the Cholesky factor of the damped inverse Hessian. Grids are fixed beforehand: from the row,
or from each group when its first input is reached.
"""

from typing import Final

import jax.numpy as jnp
import numpy as np
from qwix.contrib import gptq_core

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import QvlaError
from qvla_jax.inference.policy import Policy
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.numerics import (
    effective_group,
    how_to_quantize,
    padded,
    qwix_context,
    taken,
)
from qvla_jax.methods.packing import layer_by_layer
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.rows import QuantizedRows

# qwix's defaults, which are those of the published code.
_DAMPING: Final = 0.01


def gptq(
    weight: Float[Array, "c k"],
    hessian: Float[np.ndarray, "k k"],
    bits: int,
    group: int | None = None,
) -> QuantizedRows:
    """Codes and scales of rows [c, k].

    Args:
        weight: source rows.
        hessian: sum or mean of x x^T; its scale does not matter.
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; None: the whole row.

    Raises:
        QvlaError: the Hessian cannot be factored in float32 at any damping.
    """
    fan_in = weight.shape[1]
    group = effective_group(fan_in, group)
    rows = padded(weight, group)
    extra = rows.shape[1] - fan_in
    # Padded inputs are never active, so GPTQ treats them as dead columns.
    level = max(float(np.mean(np.diagonal(hessian))), np.finfo(np.float64).tiny)
    scaled = jnp.asarray(np.pad(hessian / level, (0, extra)), jnp.float32)
    damping = _DAMPING
    while damping <= 1:
        with qwix_context():
            array, losses = gptq_core.quantize_weight(
                rows, scaled, how_to_quantize(bits, group), percdamp=damping
            )
        if np.isfinite(np.asarray(losses)).all():
            return taken(array, fan_in, bits, group)
        damping *= 10
    raise QvlaError(f"GPTQ: a Hessian of {fan_in} inputs has no Cholesky factor in float32")


def gptq_policy(measured: Measurements, setting: Setting) -> Policy:
    """The packed policy."""
    return layer_by_layer(
        measured, setting, lambda weight, m, bits, group: gptq(weight, m.hessian, bits, group)
    )
