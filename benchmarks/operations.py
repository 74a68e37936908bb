"""Floating-point operations of matrix products: counted in a traced function, and per second."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def largest_rate(size: int = 4096, rounds: int = 5) -> float:
    """Operations per second of one large product in float32: the best of some rounds."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(x))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def product_operations(function: Callable[..., Any], *args: Any) -> int:
    """Two for each multiply-add of a matrix product; nothing is computed.

    The body of a `scan` counts as often as it runs; of a `cond` the dearest branch counts.

    Args:
        function: traceable.
        args: arrays, or their shapes and dtypes.
    """
    return operations_of(jax.make_jaxpr(function)(*args).jaxpr)


def operations_of(jaxpr: Any) -> int:
    """The same of a traced function."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        length = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return 2 * length * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(operations_of(branch.jaxpr) for branch in parameters["branches"])
    inner = [j for value in parameters.values() for j in _jaxprs(value)]
    times = parameters["length"] if name == "scan" else 1
    return times * sum(operations_of(jaxpr) for jaxpr in inner)


def _jaxprs(value: Any) -> list[Any]:
    inner = getattr(value, "jaxpr", value)
    return [inner] if hasattr(inner, "eqns") else []
