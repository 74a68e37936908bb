"""Networks with shapes and dtypes in place of arrays."""

import functools
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


def abstract(make: Callable[..., M], config: Any, *, dtype: Any = None) -> M:
    """A network with shapes and dtypes in place of arrays.

    Args:
        make: (config, rngs=...) -> the network with random weights.
        config: hashable; a network that was described before is not traced again.
        dtype: of all parameters; None keeps what `make` gives.
    """
    graphdef, state = _described(make, config)
    # A model keeps the variables that it is merged from: each gets its own.
    model: M = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    if dtype is not None:
        cast = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.state(model, nnx.Param)
        )
        nnx.update(model, cast)
    return model


@functools.lru_cache(maxsize=64)
def _described(make: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef[Any], Any]:
    def shapes() -> nnx.Module:
        rngs = nnx.Rngs()
        rngs.params = _OneKey(0, tag="params")  # type: ignore[attr-defined]
        return make(config, rngs=rngs)

    return nnx.split(nnx.eval_shape(shapes))
