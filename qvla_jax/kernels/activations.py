"""Activation quantizer: dynamic, symmetric, one scale for each row of x (token)."""

import dataclasses
from typing import Final

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import Array, Float, Int8
from qvla_jax.errors import InputError

# 16 does not round activations.
ACTIVATION_BITS: Final = (16, 8, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a layer does to its inputs before the product: x -> round(rotate(x scale)).

    Raises:
        InputError: no kernel has these bits, or the scale is not a vector of positive numbers that
            bfloat16 holds.
    """

    # See `quantize_activations`.
    activation_bits: int = 16
    # Factor of each input (SmoothQuant's and AWQ's 1 / s); None: 1.
    scale: Float[np.ndarray, " k"] | None = None
    # Whether they are rotated (quantization.rotation), like the rows of the weight.
    rotated: bool = False

    def __post_init__(self) -> None:
        check_activation_bits(self.activation_bits)
        if self.scale is None:
            return
        values = self.scale.astype(np.float32)
        exact = values == values.astype(ml_dtypes.bfloat16).astype(np.float32)
        if values.ndim != 1 or not (exact & np.isfinite(values) & (values > 0)).all():
            raise InputError("input scale: expected a vector of positive bfloat16 numbers")

    @property
    def is_plain(self) -> bool:
        """True if the layer uses its inputs unchanged."""
        return self.activation_bits == 16 and self.scale is None and not self.rotated


def check_activation_bits(bits: int) -> None:
    """Raises an `InputError` if no kernel has this bit-width."""
    if bits not in ACTIVATION_BITS:
        raise InputError(f"activation_bits {bits}: choose from {ACTIVATION_BITS}")


def quantize_activations(
    x: Float[Array, "*m k"], bits: int
) -> tuple[Int8[Array, "*m k"], Float[Array, "*m 1"]]:
    """Codes q and float32 scales s with x close to s q.

    s = max|x| / qmax and q = round(x qmax / max|x|), ties to even, qmax = 2^(bits-1) - 1. A row of
    zeros gets codes 0 and scale 0. 4-bit codes are held in int8.
    """
    codes, scale = _codes(x, jnp.float32(largest_code(bits)))
    return codes.astype(jnp.int8), scale


def largest_code(bits: int) -> int:
    """The grid's largest code; 0 at 16 bits, which have no grid."""
    return 0 if bits == 16 else 2 ** (bits - 1) - 1


def activation_scales(
    x: Float[Array, "*m k"], qmax: Float[Array, ""]
) -> tuple[Float[Array, "*m 1"], Float[Array, "*m 1"]]:
    """Factors of each row, float32: x times the first, rounded, are the codes, times the second x.

    Args:
        x: activations.
        qmax: `largest_code` of the bits.
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    # Below this the quotient overflows; such a row counts as zeros.
    zero = largest < jnp.float32(2.0**-100)
    inverse = jnp.where(zero, 0.0, qmax / jnp.where(zero, 1.0, largest))
    return inverse, jnp.where(zero, 0.0, largest / qmax)


def _codes(
    x: Float[Array, "*m k"], qmax: Float[Array, ""]
) -> tuple[Float[Array, "*m k"], Float[Array, "*m 1"]]:
    inverse, scale = activation_scales(x, qmax)
    return jnp.clip(jnp.round(x.astype(jnp.float32) * inverse), -qmax, qmax), scale


def round_activations(x: Float[Array, "*m k"], bits: int) -> Float[Array, "*m k"]:
    """`s q` in float32; x itself at 16 bits."""
    return round_to(x, jnp.float32(largest_code(bits))) if bits != 16 else x.astype(jnp.float32)


def round_to(x: Float[Array, "*m k"], qmax: Float[Array, ""]) -> Float[Array, "*m k"]:
    """Like `round_activations`, but one compiled program serves all bits.

    Args:
        x: activations.
        qmax: `largest_code` of the bits.
    """
    codes, scale = _codes(x, jnp.where(qmax > 0, qmax, 1.0))
    return jnp.where(qmax > 0, codes * scale, x.astype(jnp.float32))
