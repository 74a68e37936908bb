"""Floating-point operations of the matrix products in a traced function."""

import math
from collections.abc import Callable
from typing import Any

import jax


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
