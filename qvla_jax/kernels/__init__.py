"""Products with packed mixed-bit weights, without a dequantized copy.

w = kernels.pack(weight, bits)            # PackedWeight: canonical, what files hold
w = kernels.prepare(w)                    # rearranged once for this platform
y = kernels.mixed_matmul(x, w)            # x w_hat^T + bias
"""

from qvla_jax.kernels.activations import LayerInputs, quantize_activations
from qvla_jax.kernels.dispatch import canonical, implementations, mixed_matmul, prepare
from qvla_jax.kernels.joining import cannot_join, join, part
from qvla_jax.kernels.packed import (
    SOURCE_DTYPES,
    PackedWeight,
    Segment,
    dequantize,
    validate,
)
from qvla_jax.kernels.packing import nearest_rows, pack, pack_rows
from qvla_jax.kernels.sharded import ShardedWeight, shard
from qvla_jax.kernels.tables import check_table, pack_table, table_rows

__all__ = [
    "SOURCE_DTYPES",
    "LayerInputs",
    "PackedWeight",
    "Segment",
    "ShardedWeight",
    "cannot_join",
    "canonical",
    "check_table",
    "dequantize",
    "implementations",
    "join",
    "mixed_matmul",
    "nearest_rows",
    "pack",
    "pack_rows",
    "pack_table",
    "part",
    "prepare",
    "quantize_activations",
    "shard",
    "table_rows",
    "validate",
]
