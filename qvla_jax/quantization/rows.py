"""`QuantizedRows`: a layer's rows on their grids, between rounding and packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float, Int, Int8
from qvla_jax.quantization.codes import PRUNED, SOURCE, Grid


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows [c, k], each at its own bit-width: w_hat[c, i] = scales[c, i // group] codes[c, i].

    A pruned row is 0. A row of 16 bits keeps the source's numbers, which are not held here.
    """

    bits: Int[np.ndarray, " c"]
    # On the grid's code set at the row's width; unused for rows of 0 and 16 bits.
    codes: Int8[AnyArray, "c k"]
    # float32 that bfloat16 holds exactly, positive; ceil(k / group) of them for each row.
    scales: Float[AnyArray, "c g"]
    grid: Grid
    # Inputs that share a scale; None: the whole row.
    group: int | None = None
    # Factor of each input, float32 that bfloat16 holds exactly: the rows are multiplied by x[i]
    # input_scale[i]. None: 1.
    input_scale: Float[np.ndarray, " k"] | None = None

    def dequantized(self, source: Float[Array, "c k"]) -> Float[Array, "c k"]:
        """w_hat in float32; exact, for a code has 8 significant bits and a scale as many.

        Args:
            source: the rows that were quantized.
        """
        return _dequantized(self.codes, self.scales, self.bits, source, group=self.group)


@functools.partial(jax.jit, static_argnames="group")
def _dequantized(
    codes: Int8[Array, "c k"],
    scales: Float[Array, "c g"],
    bits: Int[Array, " c"],
    source: Float[Array, "c k"],
    *,
    group: int | None,
) -> Float[Array, "c k"]:
    if group is not None:
        scales = jnp.repeat(scales, group, axis=1)[:, : source.shape[1]]
    values = jnp.where((bits == PRUNED)[:, None], 0.0, codes.astype(jnp.float32) * scales)
    return jnp.where((bits == SOURCE)[:, None], source.astype(jnp.float32), values)
