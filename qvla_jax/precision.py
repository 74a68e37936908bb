"""Results that do not depend on JAX_ENABLE_X64.

Stages compute in float32 and in 32-bit integers, in float64 only where they use numpy. With 64-bit
types enabled, JAX would widen whatever has no type of its own, and stored bytes would change.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def in_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function as if JAX's 64-bit types were not enabled, whatever its caller does.

    >>> import jax.numpy as jnp
    >>> with jax.enable_x64(True):
    ...     str(jnp.ones(2).dtype), str(in_32_bits(jnp.ones)(2).dtype)
    ('float64', 'float32')

    Args:
        function: No generator, which would run after it has returned.
    """

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*arguments, **keywords)

    return call
