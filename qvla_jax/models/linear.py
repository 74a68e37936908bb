"""The linear layer of every model."""

from flax import nnx

from qvla_jax.array_typing import Array, Float


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened leading axes: [..., k] -> [..., c].

    XLA's CPU backend multiplies plain matrices nearly twice as fast as it contracts several
    leading axes, which is what the weight gradient of a [b, t, k] input asks for.
    """

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        """Inputs x [..., k] -> x kernel + bias [..., c]."""
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], flat.shape[-1])
