"""The attention of packed policies: one call of the CPU kernel instead of four of XLA's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float
from qvla_jax.kernels import cpu_attention
from qvla_jax.models.attention import DotProduct
from qvla_jax.models.surgery import named_modules, replace_modules


class FusedAttention(nnx.Module):
    """Replaces a `DotProduct`; logits are not kept, and heads stay where they are."""

    def __init__(self, function: Callable[..., Array]):
        """Takes the function of the `DotProduct`, which gives the derivatives."""
        self.function = function

    def __call__(
        self,
        q: Float[Array, "b t n d"],
        k: Float[Array, "b s m d"],
        v: Float[Array, "b s m d"],
        mask: Bool[Array, "b 1 #t s"] | None = None,
    ) -> Float[Array, "b t n d"]:
        """See `models.attention.attention`."""
        return _attention(self.function, q, k, v, mask)


def fuse_attention(model: nnx.Module) -> None:
    """Puts the kernel's attention in place of XLA's, if it runs here."""
    if cpu_attention.supported():
        found = named_modules(model, DotProduct)
        fused = {path: FusedAttention(module.function) for path, module in found.items()}
        replace_modules(model, fused)


def separate_attention(model: nnx.Module) -> None:
    """The inverse of `fuse_attention`."""
    found = named_modules(model, FusedAttention)
    replace_modules(model, {path: DotProduct(each.function) for path, each in found.items()})


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(
    function: Callable[..., Array], q: Array, k: Array, v: Array, mask: Array | None
) -> Array:
    del function
    return cpu_attention.attention(q, k, v, mask)


@_attention.defjvp
def _(
    function: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # Where derivatives are asked for, XLA computes the outputs, too.
    *inputs, mask = primals
    return jax.jvp(lambda *qkv: function(*qkv, mask), tuple(inputs), tangents[:3])
