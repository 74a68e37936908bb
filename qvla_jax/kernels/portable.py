"""Products for programs that leave this package: operations of StableHLO on the canonical weight.

The reference computes the same, but its program holds an array of positions as large as the
unpacked weight. Here every width is unpacked by shifts alone, so that a program holds no constants
and weights stay packed in its arguments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels import reference
from qvla_jax.kernels.packed import PackedWeight, segment_values


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PortableWeight:
    """A canonical weight for products that any platform compiles."""

    weight: PackedWeight

    @property
    def shape(self) -> tuple[int, int]:
        """See `dispatch.PreparedWeight`."""
        return self.weight.shape

    @property
    def implementation(self) -> str:
        """See `dispatch.PreparedWeight`."""
        return "portable"


def canonical(w: PortableWeight) -> PackedWeight:
    """The weight itself."""
    return w.weight


def matmul(
    x: Float[Array, "*m k"], prepared: PortableWeight, activation_bits: int
) -> Float[Array, "*m c"]:
    """See `kernels.reference`."""
    w = prepared.weight
    parts = [jnp.asarray(segment_values(w, number)) for number in range(len(w.segments))]
    rows = jnp.concatenate(parts) if parts else None
    return reference.product(x, w, rows, activation_bits)
