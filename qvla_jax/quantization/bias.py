"""Bias correction: what a row loses on the mean input moves into its bias.

A row w replaced by w_hat changes the output by x (w_hat - w). With E[x] over calibration inputs,

    b += E[x] (w - w_hat)

makes the mean output exact, so that the error left is (x - E[x]) (w_hat - w). A pruned row
(w_hat = 0) becomes its mean output. (docs/mathematics.md section 2; Nagel et al. 2019,
arXiv 1906.04721, section 4.2, do the same with the mean taken from batch norm.)
"""

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float


def bias_shift(
    weight: Float[Array, "c k"], quantized: Float[Array, "c k"], mean: Float[Array, " k"]
) -> Float[Array, " c"]:
    """E[x] (w - w_hat), exactly 0 for rows that did not change.

    Args:
        weight: source rows w.
        quantized: rows w_hat on their grids.
        mean: E[x] of the layer's inputs.

    Returns:
        float32 shift of each output's bias.
    """
    change = weight.astype(jnp.float32) - quantized.astype(jnp.float32)
    return jnp.matmul(change, mean.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@jax.jit
def corrected_bias(
    weight: Float[Array, "c k"],
    quantized: Float[Array, "c k"],
    mean: Float[Array, " k"],
    bias: Float[Array, " c"] | None,
) -> Float[Array, " c"]:
    """The layer's bias after correction; a layer without one gains one."""
    shift = bias_shift(weight, quantized, mean)
    return shift if bias is None else bias.astype(jnp.float32) + shift
