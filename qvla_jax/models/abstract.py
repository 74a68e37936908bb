"""Networks with shapes and dtypes in place of arrays."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


class _OneKey(nnx.RngStream):
    """Gives the same key for every draw.

    When only shapes matter, nothing is drawn, and a traced count of draws would make tracing
    quadratic in the number of layers.
    """

    def __call__(self) -> jax.Array:
        """The key."""
        return self.key[...]


def abstract(make: Callable[[nnx.Rngs], M], *, dtype: Any = None) -> M:
    """The result of a function of random streams, with shapes and dtypes in place of arrays."""

    def shapes() -> M:
        rngs = nnx.Rngs()
        rngs.params = _OneKey(0, tag="params")  # type: ignore[attr-defined]
        return make(rngs)

    model = nnx.eval_shape(shapes)
    if dtype is not None:
        cast = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.state(model, nnx.Param)
        )
        nnx.update(model, cast)
    return model
