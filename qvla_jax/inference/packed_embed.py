"""The token embedding of packed policies."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_linear import PackedArrays
from qvla_jax.models.linear import Embed
from qvla_jax.models.surgery import named_modules, replace_modules


class PackedEmbed(nnx.Module):
    """Replaces an `Embed`: token ids -> their rows, of which only these are unpacked."""

    def __init__(self, weight: kernels.PackedWeight, *, dtype: Any):
        """Puts the rows on the default device.

        Args:
            weight: a table with a row for each token; see `kernels.check_table`.
            dtype: of what a lookup returns.
        """
        kernels.check_table(weight)
        self.arrays = PackedArrays(jax.tree.map(jnp.array, weight))
        self.dtype = dtype

    def __call__(self, inputs: Int[Array, "*b"]) -> Float[Array, "*b c"]:
        """Token ids -> codes times scale of their rows, computed in float32."""
        rows = kernels.table_rows(self.arrays.get_value(), inputs.reshape(-1))
        return rows.reshape(*inputs.shape, -1).astype(self.dtype)

    @property
    def weight(self) -> kernels.PackedWeight:
        """The table, on the host."""
        return jax.device_get(self.arrays.get_value())


def packed_embeddings(model: nnx.Module) -> dict[str, PackedEmbed]:
    """Packed embeddings by dotted path."""
    return named_modules(model, PackedEmbed)


def round_embeddings(model: nnx.Module, bits: int, *, packed: bool) -> None:
    """Rounds the rows of all token embeddings of a model to nearest, in place.

    Args:
        model: whose modules, but not their arrays, are its own.
        bits: of every row: 2, 3, 4 or 8.
        packed: False keeps ordinary embeddings with the same values in float32.

    Raises:
        InputError: there is no embedding, no grid has these bits, or a table holds NaN or inf.
    """
    embeds = named_modules(model, Embed)
    if not embeds:
        raise InputError(f"embeddings of {bits} bits: the policy has no token embedding")
    for path, embed in embeds.items():
        weight = kernels.pack_table(jax.device_get(embed.embedding[...]), bits)
        if packed:
            replace_modules(model, {path: PackedEmbed(weight, dtype=embed.dtype)})
        else:
            embed.embedding = nnx.Param(kernels.dequantize(weight))
