"""BitVLA's ternary rounding (arXiv 2506.07530), after training.

BitVLA trains with weights on {-1, 0, 1} as in BitNet b1.58 (arXiv 2402.17764), one scale for the
whole matrix:

    s = mean |W|,   q = clip(round(W / s), -1, 1),   w_hat = s q.

Here a trained policy is rounded this way without training, which is not what BitVLA does. Ternary
codes have 1.58 bits of information; a public copy of BitVLA's code stores 2 bits, and so does the
packed file, with the same scale for each row.
"""

from collections.abc import Iterator
from typing import Final

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.policy import Policy
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.numerics import uniform_rows
from qvla_jax.methods.packing import packed_policy
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.layers import quantizable_layers
from qvla_jax.quantization.rows import QuantizedRows

BITS: Final = 2
# That of BitNet's code.
_SMALLEST_SCALE: Final = 1e-5


def absmean_ternary(weight: Float[Array, "c k"]) -> QuantizedRows:
    """Codes -1, 0 and 1 of rows [c, k], and their one scale, which is rounded to bfloat16 last."""
    values = np.asarray(weight.astype(jnp.float32))
    scale = max(float(np.mean(np.abs(values), dtype=np.float64)), _SMALLEST_SCALE)
    codes = np.clip(np.round(values / np.float32(scale)), -1, 1)
    stored = np.float32(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    return uniform_rows(codes, np.full((len(values), 1), stored), BITS, None)


def bitvla_policy(measured: Measurements, setting: Setting) -> Policy:
    """The packed policy; reads no frame."""
    layers = quantizable_layers(measured.policy.model, measured.rules)

    def rows() -> Iterator[QuantizedRows]:
        for layer in layers.values():
            yield absmean_ternary(layer.kernel[...].T)

    return packed_policy(measured, setting, rows(), calibrated=False)
