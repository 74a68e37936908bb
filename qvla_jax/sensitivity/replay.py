"""The compiled halves of exact probing: the unperturbed pass, and the replay of perturbations."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from qvla_jax.array_typing import Array, Bool, Float, Int
from qvla_jax.sensitivity.instrument import Calls, check_frames, side_by_side
from qvla_jax.sensitivity.stages import run_or_reuse, wrap_stages
from qvla_jax.sharding import CHANNEL_AXIS, DATA_AXIS

_EVERYWHERE, _SPLIT = PartitionSpec(), PartitionSpec(DATA_AXIS)
# Partition specs in place of the arrays.
BY_CHANNEL: Any = PartitionSpec(CHANNEL_AXIS)
_BY_BOTH: Any = PartitionSpec(CHANNEL_AXIS, DATA_AXIS)


@dataclasses.dataclass(frozen=True)
class ReplaySpec:
    """Everything but arrays that the compiled functions depend on."""

    graphdef: nnx.GraphDef[Any]
    # Layers that may be perturbed; a perturbation refers to one by its number here.
    paths: tuple[str, ...]
    # All parts that are reused or rerun, from `stages.part_paths`, including the layers.
    parts: tuple[str, ...]
    mesh: Mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbations:
    """p changes of one output channel each, p / d for each of d devices along `channel`."""

    # Number of the perturbed layer in `ReplaySpec.paths`, and its output channel.
    layer: Int[Array, " p"]
    channel: Int[Array, " p"]
    # Added to the channel's output over the tokens of each frame, padded on the right.
    change: Float[Array, "p b T"]
    # Of layers that are called several times instead: the change of the channel's row, padded on
    # the right, and of its bias. A call's change alters the inputs of later ones.
    row: Float[Array, "p K"]
    bias: Float[Array, " p"]


SPLIT_PERTURBATIONS = Perturbations(
    layer=BY_CHANNEL, channel=BY_CHANNEL, change=_BY_BOTH, row=BY_CHANNEL, bias=BY_CHANNEL
)


@dataclasses.dataclass
class Trace:
    """A pass's record: the parts in the order in which they are entered, and arrays."""

    # A part stands there once for each of its calls.
    order: list[str] = dataclasses.field(default_factory=list)
    # Of all parts.
    outputs: dict[str, Calls] = dataclasses.field(default_factory=dict)
    # Of the layers.
    inputs: dict[str, Calls] = dataclasses.field(default_factory=dict)


def record(spec: ReplaySpec, state: Any, inputs: Any) -> Trace:
    """Runs the unperturbed model; traceable."""
    trace, model, layers = Trace(), nnx.merge(spec.graphdef, state), frozenset(spec.paths)

    def call(path: str, inner: Any, *args: Any) -> Array:
        trace.order.append(path)
        if path in layers:
            trace.inputs[path] = (*trace.inputs.get(path, ()), *args)
        y = inner(*args)
        trace.outputs[path] = (*trace.outputs.get(path, ()), y)
        return y

    wrap_stages(model, spec.parts, call)
    with jax.default_matmul_precision("float32"):
        model(inputs)
    return trace


@functools.partial(jax.jit, static_argnums=0)
def unperturbed(
    spec: ReplaySpec, state: Any, inputs: Any
) -> tuple[dict[str, Calls], dict[str, Array]]:
    """Outputs of the parts' calls, and inputs [b, T, k] of the layers, by path.

    Raises:
        InputError: a layer serves all frames of a batch together.
    """

    def run(state: Any, inputs: Any) -> tuple[dict[str, Calls], dict[str, Array]]:
        trace = record(spec, state, inputs)
        count = len(jax.tree.leaves(inputs)[0])
        for path, calls in trace.inputs.items():
            check_frames(path, calls, count)
        return trace.outputs, {p: side_by_side(x, count) for p, x in trace.inputs.items()}

    return jax.shard_map(
        run, mesh=spec.mesh, in_specs=(_EVERYWHERE, _SPLIT), out_specs=_SPLIT, check_vma=False
    )(state, inputs)


@functools.partial(jax.jit, static_argnums=0)
def replay(
    spec: ReplaySpec,
    state: Any,
    inputs: Any,
    outputs: Mapping[str, Calls],
    run: Bool[Array, "d m"],
    hit: Bool[Array, "d l"],
    perturbations: Perturbations,
) -> Float[Array, "p b h a"]:
    """Action chunks under each perturbation, all of them in one batched pass.

    Args:
        spec: static description.
        state: the model's arrays.
        inputs: model inputs.
        outputs: outputs of the unperturbed parts' calls.
        run: which of `spec.parts` must run for the perturbations of each device along `channel`.
        hit: which of `spec.paths` these perturb.
        perturbations: the changes; no weight is copied for them.
    """
    return jax.shard_map(
        functools.partial(_replay, spec),
        mesh=spec.mesh,
        in_specs=(_EVERYWHERE, _SPLIT, _SPLIT, BY_CHANNEL, BY_CHANNEL, SPLIT_PERTURBATIONS),
        out_specs=_BY_BOTH,
        check_vma=False,
    )(state, inputs, outputs, run, hit, perturbations)


def _replay(
    spec: ReplaySpec,
    state: Any,
    inputs: Any,
    outputs: Mapping[str, Calls],
    run: Bool[Array, "1 m"],
    hit: Bool[Array, "1 l"],
    perturbations: Perturbations,
) -> Float[Array, "p b h a"]:
    number = {path: i for i, path in enumerate(spec.paths)}
    part = {path: i for i, path in enumerate(spec.parts)}
    count = len(jax.tree.leaves(inputs)[0])

    def one(item: Perturbations) -> Float[Array, "b h a"]:
        made: collections.Counter[str] = collections.Counter()

        def change(path: str, x: Array, y: Array) -> Array:
            if len(outputs[path]) == 1:
                added = item.change[:, : y.size // y.shape[-1] // count]
            else:
                row = item.row[: x.shape[-1]]
                x = x.astype(row.dtype)
                added = jnp.matmul(x, row, precision=jax.lax.Precision.HIGHEST) + item.bias
            added = added.reshape(y.shape[:-1]).astype(y.dtype)
            channel = jnp.where(item.layer == number[path], item.channel, -1)
            at = jnp.arange(y.shape[-1]).reshape((1,) * (y.ndim - 1) + (-1,)) == channel
            return y + jnp.where(at, added[..., None], 0)

        def call(path: str, inner: Any, *args: Any) -> Array:
            here = made[path]
            made[path] += 1
            y = run_or_reuse(run[0, part[path]], inner, args, outputs[path][here])
            if path not in number:
                return y
            return jax.lax.cond(
                hit[0, number[path]], functools.partial(change, path), lambda x, y: y, *args, y
            )

        model = nnx.merge(spec.graphdef, state)
        wrap_stages(model, spec.parts, call)
        with jax.default_matmul_precision("float32"):
            return model(inputs)

    return jax.vmap(one)(perturbations)
