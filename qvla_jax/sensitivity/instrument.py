"""Forward passes that call a hook in linear layers.

A layer is instrumented by module surgery on a merged copy of the model: a wrapper takes its place
and passes the layer's input and output to a function, whose result goes on through the network. The
model's own code is unaware of it, and the policy's model is never modified.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.models.surgery import get_module, replace_modules

# (path, input [B, t, k], output [B, t, c]) -> output [B, t, c]. B is the batch for the language
# model and batch times cameras (batch outermost) for the vision towers.
Hook: TypeAlias = Callable[[str, Array, Array], Array]


class HookedLinear(nnx.Module):
    """A linear layer whose output passes through a hook."""

    def __init__(self, linear: nnx.Module, path: str, hook: Hook):
        self.linear = linear
        self.path = path
        self.hook = hook

    def __call__(self, x: Float[Array, "B t k"]) -> Float[Array, "B t c"]:
        """The layer's output after the hook."""
        return self.hook(self.path, x, self.linear(x))


def hook_layers(model: nnx.Module, paths: Iterable[str], hook: Hook) -> None:
    """Puts a `HookedLinear` in place of each of these layers, in place.

    The hook raises a ValueError if the forward pass calls a layer twice: its rows would then have
    two inputs, and the methods here assume one.
    """
    seen: set[str] = set()

    def once(path: str, x: Array, y: Array) -> Array:
        if path in seen:
            raise ValueError(f"{path} is called twice in one forward pass, which is not supported")
        seen.add(path)
        return hook(path, x, y)

    replace_modules(model, {p: HookedLinear(get_module(model, p), p, once) for p in paths})


def hooked_call(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    args: tuple[Any, ...],
    paths: Iterable[str],
    hook: Hook,
) -> Float[Array, "b ..."]:
    """A module's output with `hook` on the layers at `paths`; traceable.

    Args:
        graphdef: from `nnx.split(module)`; a whole policy's network, or a part of it.
        state: from the same split.
        args: what the module takes.
        paths: dotted paths of linear layers.
        hook: called once for each of these layers that the forward pass reaches.
    """
    module: Any = nnx.merge(graphdef, state)
    hook_layers(module, paths, hook)
    with jax.default_matmul_precision("float32"):
        return module(*args)


def perturbed_call(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], perturbations: dict[str, Array]
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """A module's output with perturbed layer outputs, and those layers' inputs; traceable.

    Args:
        graphdef: see `hooked_call`.
        state: see there.
        args: what the module takes.
        perturbations: path -> array to add to the layer's output, such as `no_perturbations`.
    """
    seen: dict[str, Array] = {}

    def hook(path: str, x: Array, y: Array) -> Array:
        seen[path] = x
        return y + perturbations[path]

    return hooked_call(graphdef, state, args, tuple(perturbations), hook), seen


def no_perturbations(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], paths: Iterable[str]
) -> dict[str, Array]:
    """Zeros for `perturbed_call`, for each of these layers that the forward pass reaches."""
    shapes = layer_outputs(graphdef, state, args, paths)
    return {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}


def layer_outputs(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], paths: Iterable[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each layer's output, without computing anything.

    Layers that the forward pass never reaches (the public towers have a last block that no policy
    reads) are absent: their channels cannot change an action.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def record(path: str, x: Array, y: Array) -> Array:
        shapes[path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    jax.eval_shape(lambda s, a: hooked_call(graphdef, s, a, paths, record), state, args)
    return shapes


def per_frame(x: Float[Array, "B t c"], frames: int) -> Float[Array, "b T c"]:
    """Tokens of all cameras of a frame side by side: [b v, t, c] -> [b, v t, c]."""
    return x.reshape(frames, -1, x.shape[-1])
