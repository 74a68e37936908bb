"""Attention in the CPU kernel: an XLA custom call in C++ (csrc/attention.cpp)."""

import jax
import numpy as np

from qvla_jax.array_typing import Array, Bool, Float
from qvla_jax.kernels import cpu


def supported() -> bool:
    """Whether JAX computes on a CPU for which the package has a kernel that is faster than XLA."""
    return jax.default_backend() == "cpu" and cpu.instruction_set() not in (None, "portable")


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s m d"],
    v: Float[Array, "b s m d"],
    mask: Bool[Array, "b 1 #t s"] | None = None,
    *,
    max_threads: int = 0,
) -> Float[Array, "b t n d"]:
    """As `models.attention.attention`, computed in float32; without derivatives.

    Any number of threads gives the same bits.

    Args:
        q: queries, bfloat16 or float32.
        k: keys, bfloat16 or float32; n is a multiple of m.
        v: values, bfloat16 or float32.
        mask: True where a query may attend to a key.
        max_threads: threads of XLA's pool to use; 0 uses all.
    """
    cpu.library()  # registers the call
    call = jax.ffi.ffi_call(
        cpu.ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential"
    )
    operands = (q, k, v) if mask is None else (q, k, v, mask)
    return call(*operands, max_threads=np.int64(max_threads))
