"""The reference implementation in plain `jax.numpy`: it defines what `mixed_matmul` means.

    y[..., c] = sum_i x_hat[..., i] w_hat[c, i] + bias[c],

with w_hat as in `PackedWeight`, accumulated in float32. x_hat is x at 16 activation bits; at 8 and
4 bits it is x rounded by `quantize_activations`, except for 16-bit rows, which use x in bfloat16:
anything else would take them several times as long as the rest of the layer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels.activations import round_activations
from qvla_jax.kernels.packed import PackedWeight, stored_rows
from qvla_jax.quantization.codes import SOURCE


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["implementation"]
)
@dataclasses.dataclass(frozen=True)
class CanonicalWeight:
    """A canonical weight reserved for an implementation that computes from it as it is."""

    weight: PackedWeight
    # See `dispatch.PreparedWeight`.
    implementation: str

    @property
    def shape(self) -> tuple[int, int]:
        """See `dispatch.PreparedWeight`."""
        return self.weight.shape


def prepare(w: PackedWeight) -> CanonicalWeight:
    """The reference computes from the canonical order."""
    return CanonicalWeight(w, "reference")


def canonical(w: CanonicalWeight) -> PackedWeight:
    """The weight itself."""
    return w.weight


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    del w
    return None


def matmul(
    x: Float[Array, "*m k"], prepared: CanonicalWeight, activation_bits: int
) -> Float[Array, "*m c"]:
    """See the module."""
    w = prepared.weight
    parts = []
    if w.segments:
        rows = stored_rows(w)
        exact = w.segments[0].rows if w.segments[0].bits == SOURCE else 0
        whole = x.astype(jnp.bfloat16)
        if activation_bits == 16:
            exact, whole = len(rows), x
        if exact:
            parts.append(_dot(whole.astype(jnp.float32), rows[:exact].T))
        if exact < len(rows):
            parts.append(_dot(round_activations(x, activation_bits), rows[exact:].T))
    return assembled(parts, x, w)


def assembled(
    parts: list[Float[Array, "*m r"]], x: Float[Array, "*m k"], w: PackedWeight
) -> Float[Array, "*m c"]:
    """Products in the order of the index -> those of all channels, with bias, in the dtype of x."""
    pruned = jnp.zeros((*x.shape[:-1], 1), jnp.float32)
    y = jnp.concatenate([pruned, *parts], axis=-1)
    if w.index is None:
        y = y[..., 1:]
    else:
        index = jnp.asarray(w.index)
        place = jnp.arange(1, len(index) + 1)
        y = y[..., jnp.zeros(w.shape[0], place.dtype).at[index].set(place)]
    if w.bias is not None:
        y = y + jnp.asarray(w.bias).astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def transposed(dy: Float[Array, "*m c"], w: PackedWeight) -> Float[Array, "*m k"]:
    """`dy w_hat`: the gradient with respect to the activations, for every implementation."""
    if not w.segments:
        return jnp.zeros((*dy.shape[:-1], w.shape[1]), dy.dtype)
    kept = dy if w.index is None else dy[..., jnp.asarray(w.index)]
    return _dot(kept.astype(jnp.float32), stored_rows(w)).astype(dy.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
