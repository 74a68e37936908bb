"""The linear layer of every model."""

from typing import Any

from flax import nnx

from qvla_jax.array_typing import Array, Float


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
