"""The reverse sweep with weights moved to the device one stage at a time.

The network's stages (patch embeddings, transformer blocks, projectors) run one after the other,
each compiled separately, and only their inputs are kept. On the way back a stage's weights are read
again, its forward pass runs again, and its layers' inputs and cotangents are contracted before the
next stage's weights are read. The layers of a stage that is called several times wait for the way
back through all of its calls; its weights are read again for each. Everything between stages
(embeddings, norms, the head) runs as in the model's own code. With weights in files
(`load_policy(..., mapped=True)`) a 7B policy needs the memory of its largest stage.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError
from qvla_jax.mapping import release_pages
from qvla_jax.models.loops import looping, unrolled
from qvla_jax.sensitivity.instrument import (
    Calls,
    check_frames,
    no_perturbations,
    perturbed_call,
    side_by_side,
)
from qvla_jax.sensitivity.replay import ReplaySpec, order_of
from qvla_jax.sensitivity.reverse import Contraction, Probed, ReverseSpec, sum_in_blocks
from qvla_jax.sensitivity.stages import wrap_stages


def streamed_sweep(
    spec: ReverseSpec,
    stages: Sequence[str],
    state: Any,
    constants: Mapping[str, Any],
    probed: Probed,
) -> dict[str, Float[Array, "b ..."]]:
    """Like `reverse.reverse_sweep`, on one device.

    Args:
        spec: static description; its mesh is not used.
        stages: paths of the network's stages, from `stages.stage_paths`.
        state: the model's arrays, on the device, on the host or in files.
        constants: path -> the contraction's arrays for this layer, requested once, when the layer
            is reached.
        probed: frames and probes.

    Returns:
        Path -> contraction, summed over the probes. Layers that the forward pass never reaches
        are absent.

    Raises:
        InputError: the forward pass calls a layer outside of every stage.
    """
    layers = {s: tuple(p for p in spec.paths if p == s or p.startswith(f"{s}.")) for s in stages}
    _check_stages(spec, stages, state, probed.inputs)
    tape = _Tape(spec.contraction, layers, constants, probed.frames.shape[0])

    def run(token: Float[Array, ""]) -> Float[Array, "b h a"]:
        model: Any = nnx.merge(spec.graphdef, state)
        wrap_stages(model, stages, functools.partial(tape.call, token))
        return model(probed.inputs)

    # Each call of a stage reads its weights again.
    with jax.default_matmul_precision("float32"), looping(unrolled):
        action, pull_back = jax.vjp(run, jnp.zeros((), jnp.float32))
        jax.vmap(pull_back)(spec.vectors(probed, action))
    return tape.contracted()


def _check_stages(spec: ReverseSpec, stages: Sequence[str], state: Any, inputs: Any) -> None:
    """Checks that every call of a layer is one of a stage.

    Layers that nothing reads, such as a tower's attention pool, need no stage.

    Raises:
        InputError: a call is not.
    """
    parts = tuple(dict.fromkeys((*stages, *spec.paths)))
    order = order_of(ReplaySpec(spec.graphdef, spec.paths, parts, spec.mesh), state, inputs)
    within, layers = 0, frozenset(spec.paths)
    for place, path in enumerate(order.paths):
        if path in stages:
            within = max(within, order.ends[place])
        if path in layers and place >= within:
            raise InputError(
                f"{path} is called outside of every stage (a block, a patch embedding); streamed "
                "sweeps measure the layers of stages only: exclude it"
            )


@dataclasses.dataclass
class _Tape:
    """Runs stages, and contracts their layers' cotangents on the way back."""

    contraction: Contraction
    layers: Mapping[str, tuple[str, ...]]  # stage -> its layers
    constants: Mapping[str, Any]
    frames: int
    # Calls of each stage whose way back is still to come.
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    # Layer -> inputs and outputs' cotangents of the calls of its stage, the last call first.
    passed: dict[str, list[tuple[Calls, Calls]]] = dataclasses.field(default_factory=dict)
    found: dict[str, Array] = dataclasses.field(default_factory=dict)

    def call(self, token: Float[Array, ""], path: str, inner: nnx.Module, *args: Any) -> Any:
        """One stage; see `stages.wrap_stages`.

        Args:
            token: variable with respect to which the whole pass is differentiated, so that the
                first stages are, too.
            path: the stage.
            inner: its module.
            args: its arguments.
        """
        layers = self.layers[path]
        inside = tuple(layer.removeprefix(f"{path}.") for layer in layers)
        if layers == (path,):  # the stage is a layer itself
            inner, inside = _Alone(inner), ("layer",)
        stage, state, fixed, given = split_stage(inner, args)
        self.calls[path] += 1

        def forward(values: list[Array]) -> Any:
            # Queued stages would all hold their weights.
            y = jax.block_until_ready(_run(stage, state, fixed, values))
            _release(state)
            return y

        def backward(values: list[Array], cotangents: Any) -> list[Array]:
            seen, at_outputs, at_inputs = pull_back_stage(
                stage, inside, state, fixed, values, cotangents
            )
            _release(state)
            self.calls[path] -= 1
            for layer, name in zip(layers, inside, strict=True):
                if name in seen:
                    both = seen.pop(name), at_outputs.pop(name)
                    self.passed.setdefault(layer, []).append(both)
                    if not self.calls[path]:
                        self._contract(layer)
            # Finish all computation before the next stage's weights are read.
            jax.block_until_ready(self.found)
            return at_inputs

        return _pulled_back_together(forward, backward)(token, given)

    def contracted(self) -> dict[str, Array]:
        """Path -> contraction, when the way back has ended."""
        for layer in list(self.passed):  # of stages with a call that no action reads
            self._contract(layer)
        return self.found

    def _contract(self, layer: str) -> None:
        inputs: Calls = ()
        cotangents: Calls = ()
        for x, g in reversed(self.passed.pop(layer)):
            inputs, cotangents = (*inputs, *x), (*cotangents, *g)
        check_frames(layer, inputs, self.frames)
        constants = self.constants.get(layer)
        self.found[layer] = _contract(self.contraction, self.frames, constants, inputs, cotangents)


class _Alone(nnx.Module):
    """A layer as a module that holds it, for hooks to take its place."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x: Array) -> Array:
        return self.layer(x)  # type: ignore[operator]


def _pulled_back_together(
    function: Callable[[list[Array]], Any],
    backward: Callable[[list[Array], Any], list[Array]],
) -> Callable[[Float[Array, ""], list[Array]], Any]:
    """A function whose `backward` gets the cotangents of all probes at once, outside any trace.

    Differentiation and `vmap` run eagerly here, so that the transposed function's batching rule
    gets arrays.
    """

    @jax.custom_vjp
    def step(token: Array, values: list[Array]) -> Any:
        del token
        return function(values)

    def forward(token: Array, values: list[Array]) -> tuple[Any, list[Array]]:
        return step(token, values), values

    def transposed(values: list[Array], cotangent: Any) -> tuple[Array, list[Array]]:
        @custom_vmap
        def pull(cotangent: Any) -> list[Array]:  # for its shapes alone
            del cotangent
            return [jnp.zeros_like(v) for v in values]

        @pull.def_vmap
        def pull_all(
            probes: int, batched: list[Any], cotangents: Any
        ) -> tuple[list[Array], list[bool]]:
            of_all = jax.tree.map(
                lambda x, each: x if each else jnp.broadcast_to(x, (probes, *x.shape)),
                cotangents,
                batched[0],
            )
            return backward(values, of_all), [True] * len(values)

        return jnp.zeros((), jnp.float32), pull(cotangent)

    step.defvjp(forward, transposed)
    return step


@dataclasses.dataclass(frozen=True)
class StaticStage:
    """What a stage's compiled functions depend on besides arrays; equal blocks share it."""

    graphdef: nnx.GraphDef[Any]
    tree: Any  # of the arguments
    floats: tuple[int, ...]  # which of the arguments' leaves are differentiated

    def arguments(self, fixed: list[Any], values: list[Array]) -> tuple[Any, ...]:
        """The stage's arguments from those that are differentiated and the others."""
        leaves = list(fixed)
        for place, value in zip(self.floats, values, strict=True):
            leaves[place] = value
        return jax.tree.unflatten(self.tree, leaves)


def split_stage(
    module: nnx.Module, args: tuple[Any, ...]
) -> tuple[StaticStage, Any, list[Any], list[Array]]:
    """A stage's static part, its state, and its constant and differentiated arguments.

    Args:
        module: the stage.
        args: what it is called with.
    """
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(args)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    fixed = [None if i in floats else x for i, x in enumerate(leaves)]
    return StaticStage(graphdef, tree, tuple(floats)), state, fixed, [leaves[i] for i in floats]


@functools.partial(jax.jit, static_argnums=0)
def _run(stage: StaticStage, state: Any, fixed: list[Any], values: list[Array]) -> Any:
    return perturbed_call(stage.graphdef, state, stage.arguments(fixed, values), {})[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def pull_back_stage(
    stage: StaticStage,
    layers: tuple[str, ...],
    state: Any,
    fixed: list[Any],
    values: list[Array],
    cotangents: Any,
) -> tuple[dict[str, Calls], dict[str, Calls], list[Array]]:
    """Inputs of the stage's layers, and cotangents of their outputs and of the stage's inputs."""

    def forward(perturbations: dict[str, Calls], values: list[Array]) -> tuple[Array, Any]:
        return perturbed_call(stage.graphdef, state, stage.arguments(fixed, values), perturbations)

    zeros = no_perturbations(stage.graphdef, state, stage.arguments(fixed, values), layers)
    _, pull_back, seen = jax.vjp(forward, zeros, values, has_aux=True)
    at_outputs, at_inputs = jax.vmap(pull_back)(cotangents)
    return seen, at_outputs, at_inputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _contract(
    contraction: Contraction,
    count: int,
    constants: Any,
    inputs: Calls,
    cotangents: Calls,
) -> Float[Array, "b ..."]:
    """Of one layer: cotangents [s, B, t, c] of its calls with their inputs [B, t, k]."""
    of_cotangent = contraction(side_by_side(inputs, count), constants)
    return sum_in_blocks(lambda calls: of_cotangent(side_by_side(calls, count)), cotangents, 1)


def _release(state: Any) -> None:
    for leaf in jax.tree.leaves(state):
        release_pages(leaf)
