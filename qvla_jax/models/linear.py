"""The linear layer and the embedding of every model."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float, Int


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened leading axes: [..., k] -> [..., c].

    XLA's CPU backend multiplies plain matrices nearly twice as fast as it contracts several
    leading axes, which is what the weight gradient of a [b, t, k] input asks for.
    """

    def __call__(
        self, inputs: Float[Array, "*b k"], out_sharding: Any = None
    ) -> Float[Array, "*b c"]:
        """Inputs [..., k] -> inputs kernel + bias [..., c]; see `nnx.Linear`."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return flat.reshape(*inputs.shape[:-1], flat.shape[-1])


class Embed(nnx.Embed):
    """`nnx.Embed` that converts the rows that are looked up, not the whole table."""

    def __call__(self, inputs: Int[Array, "*b"], out_sharding: Any = None) -> Float[Array, "*b c"]:
        """Token ids -> their rows in the layer's dtype; see `nnx.Embed`."""
        del out_sharding
        return jnp.take(self.embedding[...], inputs, axis=0).astype(self.dtype)
