"""`mixed_matmul` and `prepare`: one name, several implementations."""

import functools
import importlib
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError, unknown
from qvla_jax.kernels import reference
from qvla_jax.kernels.activations import check_activation_bits
from qvla_jax.kernels.packed import PackedWeight


class PreparedWeight(Protocol):
    """A `PackedWeight`, or a backend's arrangement of one: a pytree with these static fields."""

    @property
    def shape(self) -> tuple[int, int]:
        """(c, k), pruned channels included."""
        ...

    @property
    def implementation(self) -> str:
        """The implementation that this arrangement belongs to."""
        ...


# Implementation -> module; imported when first used. Each has `prepare` (the weight in its own
# arrangement), `canonical` (the inverse), `supports` (why it cannot run a weight here, or None) and
# `matmul` (x [..., k], the arrangement, activation bits -> y [..., c] in the dtype of x).
_MODULES: Final[dict[str, str]] = {
    "reference": "qvla_jax.kernels.reference",
    "cpu": "qvla_jax.kernels.cpu",
    "pallas_tpu": "qvla_jax.kernels.pallas_tpu",
    "pallas_gpu": "qvla_jax.kernels.pallas_gpu",
    "pallas_triton": "qvla_jax.kernels.pallas_triton",
}
# Arrangements that no platform prefers. Their products are composed of other operations of JAX, and
# have their gradients.
_COMPOSED: Final[dict[str, str]] = {
    "sharded": "qvla_jax.kernels.sharded",
    "portable": "qvla_jax.kernels.portable",
}
# Platform (`jax.default_backend()`) -> the implementations to try, best first.
_PREFERRED: Final[dict[str, tuple[str, ...]]] = {
    "cpu": ("cpu",),
    "tpu": ("pallas_tpu",),
    "gpu": ("pallas_gpu", "pallas_triton"),
}


def implementations() -> tuple[str, ...]:
    """Names that `implementation` takes."""
    return tuple(_MODULES)


def prepare(w: PackedWeight, implementation: str | None = None) -> Any:
    """Rearranges a packed weight for an implementation, once, at load.

    Args:
        w: canonical weight.
        implementation: None takes the best for the platform.

    Returns:
        What `mixed_matmul` takes in place of `w`: a pytree with the same outputs.

    Raises:
        InputError: unknown implementation, or one that cannot run this weight here.
    """
    name = _choose(w, implementation)
    return _backend(name).prepare(w)


def canonical(w: Any) -> PackedWeight:
    """The canonical weight that `prepare` made `w` from."""
    return w if isinstance(w, PackedWeight) else _backend(w.implementation).canonical(w)


def mixed_matmul(
    x: Float[Array, "*m k"],
    w: Any,
    activation_bits: int = 16,
    implementation: str | None = None,
) -> Float[Array, "*m c"]:
    """Y = x w_hat^T + bias from packed weights; `kernels.reference` defines it exactly.

    Differentiable with respect to x (rounding of activations counts as the identity); the weight
    is a constant. Works under `jit` and `vmap`.

    Args:
        x: activations, bfloat16 or float32, any number of leading axes.
        w: a `PackedWeight`, or the result of `prepare` or `shard`. Every call rearranges a
            canonical weight, so prepare weights that are used more than once.
        activation_bits: 16 uses x unchanged; 8 and 4 round it to integers row by row, or to
            bfloat16 for rows of 16 bits.
        implementation: "reference" or another of `implementations()`; None takes the one that `w`
            was prepared for, or else the best for the platform.

    Returns:
        [..., c] in the dtype of x, accumulated in float32.

    Raises:
        InputError: x does not fit the weight, its dtype has no kernel, or the implementation
            cannot run the weight here.
    """
    check_activation_bits(activation_bits)
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise InputError(f"x has shape {x.shape}; the weight takes [..., {w.shape[1]}]")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"x is {x.dtype}; kernels take float32 and bfloat16")
    if isinstance(w, PackedWeight):
        name = _choose(w, implementation)
        w = _backend(name).prepare(w)
    else:
        name = w.implementation
        if implementation not in (None, name):
            raise InputError(f"the weight was prepared for {name!r}, not for {implementation!r}")
        if name in _COMPOSED:
            return _backend(name).matmul(x, w, activation_bits)
    return _matmul(x, w, activation_bits, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, w: Any, activation_bits: int, name: str) -> Array:
    return _backend(name).matmul(x, w, activation_bits)


def _forward(x: Array, w: Any, activation_bits: int, name: str) -> tuple[Array, Any]:
    return _matmul(x, w, activation_bits, name), w


def _backward(activation_bits: int, name: str, w: Any, dy: Array) -> tuple[Array, None]:
    del activation_bits, name
    # Inference needs no gradients, so all implementations share one.
    return reference.transposed(dy, canonical(w)), None


_matmul.defvjp(_forward, _backward)


def _choose(w: PackedWeight, implementation: str | None) -> str:
    if implementation is not None:
        if implementation not in _MODULES:
            raise InputError(unknown("implementation", implementation, _MODULES))
        if reason := _backend(implementation).supports(w):
            raise InputError(f"implementation {implementation!r}: {reason}")
        return implementation
    for name in _PREFERRED.get(jax.default_backend(), ()):
        if _backend(name).supports(w) is None:
            return name
    return "reference"


def _backend(name: str) -> Any:
    return importlib.import_module((_MODULES | _COMPOSED)[name])
