"""`vmap` of a product adds rows to one product instead of adding products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from qvla_jax.array_typing import Array


def over_rows(rows: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """`rows`, a product [m, k] -> [m, c], for any leading axes of x, and under `vmap`.

    A mapped axis of x becomes another leading axis. Mapped weights are processed one by one.
    """

    @custom_vmap
    def product(x: Array, w: Any) -> Array:
        y = rows(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @product.def_vmap
    def _(size: int, batched: Any, x: Array, w: Any) -> tuple[Array, bool]:
        del size
        x_batched, w_batched = batched
        if not any(jax.tree.leaves(w_batched)):
            return product(x, w), True
        if not all(jax.tree.leaves(w_batched)):
            raise NotImplementedError("vmap over some of the arrays of a packed weight")
        if x_batched:
            return jax.lax.map(lambda pair: product(*pair), (x, w)), True
        return jax.lax.map(functools.partial(product, x), w), True

    return product
