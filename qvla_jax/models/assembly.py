"""Builds the network that a configuration describes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from qvla_jax.config import OpenVLAConfig
from qvla_jax.models.openvla import OpenVLA, OpenVLAOFT, Prismatic
from qvla_jax.models.univla import UniVLA

M = TypeVar("M", bound=nnx.Module)

_BY_DECODING = {"l1": OpenVLAOFT, "tokens": OpenVLA, "latents": UniVLA}


def make_model(config: OpenVLAConfig, *, rngs: nnx.Rngs) -> Prismatic:
    """The architecture that a configuration describes, with random weights."""
    return _BY_DECODING[config.decoding](config, rngs=rngs)


class _OneKey(nnx.RngStream):
    """Gives the same key for every draw.

    When only shapes matter, nothing is drawn, and a traced count of draws would make tracing
    quadratic in the number of layers.
    """

    def __call__(self) -> jax.Array:
        """The key."""
        return self.key[...]


def abstract_model(config: OpenVLAConfig, *, dtype: Any = None) -> Prismatic:
    """The architecture with shapes and dtypes in place of arrays: costs no memory, cannot run.

    Args:
        config: the architecture.
        dtype: dtype of all parameters; float32 by default. Arithmetic stays in float32.
    """
    return abstract(lambda rngs: make_model(config, rngs=rngs), dtype=dtype)


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
