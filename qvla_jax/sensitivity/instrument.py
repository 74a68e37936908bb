"""Forward passes that call a hook in linear layers.

A layer is instrumented by module surgery on a merged copy of the model: a wrapper takes its place
and passes the layer's input and output to a function, whose result goes on through the network. The
model's own code is unaware of it, and the policy's model is never modified.

A forward pass may call a layer several times, as flow matching calls its expert once in every step.
The layer's weights are the same in all calls, so a change of a row changes all of them, and their
tokens count side by side. A loop over such calls (`models.loops`) stays one compiled body, whose
inside is computed again on the way back: what it needs in memory is that of one round.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.models.loops import Loop, Round, looping, unrolled
from qvla_jax.models.surgery import get_module, replace_modules

# (path, input [B, t, k], output [B, t, c]) -> output [B, t, c]. B is the batch for the language
# model and batch times cameras (batch outermost) for the vision towers.
Hook: TypeAlias = Callable[[str, Array, Array], Array]
# An array of each of a layer's calls, in the order in which the forward pass makes them.
Calls: TypeAlias = tuple[Any, ...]


class HookedLinear(nnx.Module):
    """A linear layer whose output passes through a hook."""

    def __init__(self, linear: nnx.Module, path: str, hook: Hook):
        self.linear = linear
        self.path = path
        self.hook = hook

    def __call__(self, x: Float[Array, "B t k"]) -> Float[Array, "B t c"]:
        """The layer's output after the hook."""
        return self.hook(self.path, x, self.linear(x))


class HookedEmbed(HookedLinear):
    """A token embedding whose rows pass through a hook; its input is a token's number."""

    def __call__(self, tokens: Int[Array, "B t"]) -> Float[Array, "B t c"]:
        """The rows of the tokens after the hook, which sees the tokens as [B, t, 1]."""
        return self.hook(self.path, tokens[..., None], self.linear(tokens))


def hook_layers(model: nnx.Module, paths: Iterable[str], hook: Hook) -> None:
    """Puts a `HookedLinear` or `HookedEmbed` in place of each of these layers, in place."""

    def hooked(path: str) -> HookedLinear:
        layer = get_module(model, path)
        kind = HookedEmbed if isinstance(layer, nnx.Embed) else HookedLinear
        return kind(layer, path, hook)

    replace_modules(model, {path: hooked(path) for path in paths})


def hooked_call(
    graphdef: nnx.GraphDef[Any],
    state: Any,
    args: tuple[Any, ...],
    paths: Iterable[str],
    hook: Hook,
    loop: Loop = unrolled,
) -> Any:
    """A module's output with `hook` on the layers at `paths`; traceable.

    Args:
        graphdef: from `nnx.split(module)`; a whole policy's network, or a part of it.
        state: from the same split.
        args: what the module takes.
        paths: dotted paths of linear layers and token embeddings.
        hook: called at each call of these layers, in the order of execution.
        loop: runs the module's loops.
    """
    module: Any = nnx.merge(graphdef, state)
    hook_layers(module, paths, hook)
    with jax.default_matmul_precision("float32"), looping(loop):
        return module(*args)


def perturbed_call(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], perturbations: dict[str, Calls]
) -> tuple[Any, dict[str, Calls]]:
    """A module's output with perturbed layer outputs, and those layers' inputs; traceable.

    Args:
        graphdef: see `hooked_call`.
        state: see there.
        args: what the module takes.
        perturbations: path -> arrays to add to the layer's outputs, such as `no_perturbations`.
    """
    run = _Perturbed(perturbations)
    y = hooked_call(graphdef, state, args, tuple(perturbations), run.hook, run.loop)
    return y, run.seen


class _Perturbed:
    """The hooks of one pass, which add to layers' outputs and keep their inputs."""

    def __init__(self, given: Mapping[str, Calls]):
        # None adds nothing.
        self.given: Mapping[str, Calls] | None = given
        self.seen: dict[str, Calls] = {}

    def hook(self, path: str, x: Array, y: Array) -> Array:
        before = self.seen.get(path, ())
        self.seen[path] = (*before, x)
        return y if self.given is None else y + self.given[path][len(before)]

    def loop(self, body: Round, start: Any, times: int) -> Any:
        """The body takes its part of the perturbations, and returns what it has seen."""
        given, seen = self.given, self.seen
        assert given is not None
        self.given, self.seen = None, {}
        jax.eval_shape(lambda x: body(x, jnp.int32(0)), start)
        own = {
            path: rounds_of(given[path][len(seen.get(path, ())) :], len(inside), times)
            for path, inside in self.seen.items()
        }

        def one_round(x: Any, numbered: tuple[Array, dict[str, Calls]]) -> tuple[Any, Any]:
            number, self.given = numbered
            self.seen = {}
            return body(x, number), self.seen

        remade = jax.checkpoint(one_round, prevent_cse=False)
        end, found = jax.lax.scan(remade, start, (jnp.arange(times), own))
        self.given, self.seen = given, dict(seen)
        for path, inside in found.items():
            self.seen[path] = (*seen.get(path, ()), *calls_of(inside, times))
        return end


def rounds_of(calls: Calls, each: int, times: int) -> Calls:
    """Arrays of a loop's calls, each round's in order -> those of each call in a round, stacked."""
    return tuple(
        jax.tree.map(lambda *x: jnp.stack(x), *calls[place : each * times : each])
        for place in range(each)
    )


def calls_of(stacked: Calls, times: int) -> Calls:
    """The inverse of `rounds_of`."""
    return tuple(
        jax.tree.map(operator.itemgetter(number), rounds)
        for number in range(times)
        for rounds in stacked
    )


def no_perturbations(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], paths: Iterable[str]
) -> dict[str, Calls]:
    """Zeros for `perturbed_call`, for each of these layers that the forward pass reaches."""
    return {
        path: tuple(jnp.zeros(shape.shape, shape.dtype) for shape in calls)
        for path, calls in layer_outputs(graphdef, state, args, paths).items()
    }


def layer_outputs(
    graphdef: nnx.GraphDef[Any], state: Any, args: tuple[Any, ...], paths: Iterable[str]
) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """Shape and dtype of each layer's output in each call, without computing anything.

    Layers that the forward pass never reaches (the public towers have a last block that no policy
    reads) are absent: their channels cannot change an action.
    """
    shapes: dict[str, tuple[jax.ShapeDtypeStruct, ...]] = {}

    def record(path: str, x: Array, y: Array) -> Array:
        shapes[path] = (*shapes.get(path, ()), jax.ShapeDtypeStruct(y.shape, y.dtype))
        return y

    def once(body: Round, start: Any, times: int) -> Any:
        """Rounds have the same shapes."""
        before = {path: len(calls) for path, calls in shapes.items()}
        end = body(start, 0)
        for path, calls in shapes.items():
            first = before.get(path, 0)
            shapes[path] = (*calls[:first], *calls[first:] * times)
        return end

    jax.eval_shape(lambda s, a: hooked_call(graphdef, s, a, paths, record, once), state, args)
    return shapes


def per_frame(x: Float[Array, "B t c"], frames: int) -> Float[Array, "b T c"]:
    """Tokens of all cameras of a frame side by side: [b v, t, c] -> [b, v t, c]."""
    return x.reshape(frames, -1, x.shape[-1])


def side_by_side(calls: Calls, frames: int) -> Float[Array, "b T c"]:
    """Tokens of all calls and all cameras of a frame, side by side."""
    tokens = [per_frame(x, frames) for x in calls]
    return tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens, axis=1)


def check_frames(path: str, calls: Calls, frames: int) -> None:
    """Checks that a layer's tokens belong to single frames.

    Raises:
        InputError: one call serves all frames of a batch together.
    """
    if any(x.shape[0] % frames for x in calls):
        raise InputError(
            f"{path}: one call of this layer serves all {frames} frames of a batch, whose costs it "
            "does not tell apart; exclude the layer, or take one frame at a time"
        )
