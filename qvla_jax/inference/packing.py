"""Packs one layer's quantized rows, with the dtypes that the layout counts."""

import ml_dtypes
import numpy as np

from qvla_jax import kernels
from qvla_jax.array_typing import AnyArray, Float
from qvla_jax.quantization.index import LayerInfo
from qvla_jax.quantization.rows import QuantizedRows


def pack_layer(
    layer: LayerInfo,
    rows: QuantizedRows,
    source: Float[AnyArray, "c k"],
    bias: Float[AnyArray, " c"] | None,
    *,
    index: bool,
) -> kernels.PackedWeight:
    """Packs the rows of a layer; 16-bit rows and the bias have the layer's source dtype.

    Args:
        layer: provides `source_bytes`.
        rows: codes and scales.
        source: the rows that were quantized, which 16-bit rows keep.
        bias: of each channel, corrections included.
        index: whether to store the channel of each row.

    Raises:
        InputError: see `kernels.pack_rows`.
    """
    dtype = ml_dtypes.bfloat16 if layer.source_bytes == 2 else np.float32
    return kernels.pack_rows(
        rows,
        source,
        bias=None if bias is None else np.asarray(bias).astype(dtype),
        source_dtype=np.dtype(dtype).name,
        index=index,
    )
