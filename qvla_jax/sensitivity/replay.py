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
from qvla_jax.models.loops import Round, looping
from qvla_jax.sensitivity.instrument import Calls, calls_of, check_frames, rounds_of, side_by_side
from qvla_jax.sensitivity.stages import Order, run_or_reuse, wrap_stages
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
    """A pass's record: the calls of all parts, and arrays."""

    order: Order = dataclasses.field(default_factory=Order)
    # Of all parts; a part may return a tree of arrays.
    outputs: dict[str, Calls] = dataclasses.field(default_factory=dict)
    # Of the layers.
    inputs: dict[str, Calls] = dataclasses.field(default_factory=dict)


def record(spec: ReplaySpec, state: Any, inputs: Any) -> Trace:
    """Runs the unperturbed model; traceable."""
    trace, model, layers = Trace(), nnx.merge(spec.graphdef, state), frozenset(spec.paths)

    def call(path: str, inner: Any, *args: Any) -> Any:
        own = trace
        number = own.order.enter(path)
        if path in layers:
            own.inputs[path] = (*own.inputs.get(path, ()), *args)
        y = inner(*args)
        own.outputs[path] = (*own.outputs.get(path, ()), y)
        own.order.leave(number)
        return y

    def loop(body: Round, start: Any, times: int) -> Any:
        nonlocal trace
        whole, order = trace, Order()

        def one_round(x: Any, number: Array) -> tuple[Any, Any]:
            nonlocal trace, order
            trace = Trace()
            x = body(x, number)
            order = trace.order
            return x, (trace.outputs, trace.inputs)

        end, found = jax.lax.scan(one_round, start, jnp.arange(times))
        trace = whole
        trace.order.extend(order, times)
        for kept, rounds in zip((trace.outputs, trace.inputs), found, strict=True):
            for path, stacked in rounds.items():
                kept[path] = (*kept.get(path, ()), *calls_of(stacked, times))
        return end

    wrap_stages(model, spec.parts, call)
    with jax.default_matmul_precision("float32"), looping(loop):
        model(inputs)
    return trace


def order_of(spec: ReplaySpec, state: Any, inputs: Any) -> Order:
    """The calls of all parts, without computing anything."""
    order = Order()

    def run(state: Any, inputs: Any) -> None:
        order.extend(record(spec, state, inputs).order, 1)

    jax.eval_shape(run, state, inputs)
    return order


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
    run: Mapping[str, Bool[Array, "d n"]],
    hit: Bool[Array, "d l"],
    perturbations: Perturbations,
) -> Float[Array, "p b h a"]:
    """Action chunks under each perturbation, all of them in one batched pass.

    Args:
        spec: static description.
        state: the model's arrays.
        inputs: model inputs.
        outputs: outputs of the unperturbed parts' calls.
        run: which of the n calls of each part must run for the perturbations of each device along
            `channel`.
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
    run: Mapping[str, Bool[Array, "1 n"]],
    hit: Bool[Array, "1 l"],
    perturbations: Perturbations,
) -> Float[Array, "p b h a"]:
    flags = {path: tuple(of_part[0]) for path, of_part in run.items()}

    def one(item: Perturbations) -> Float[Array, "b h a"]:
        replayed = _Replayed(spec, item, len(jax.tree.leaves(inputs)[0]), hit[0], outputs, flags)
        model = nnx.merge(spec.graphdef, state)
        wrap_stages(model, spec.parts, replayed.call)
        with jax.default_matmul_precision("float32"), looping(replayed.loop):
            return model(inputs)

    return jax.vmap(one)(perturbations)


class _Replayed:
    """The calls of a pass under one perturbation."""

    def __init__(
        self,
        spec: ReplaySpec,
        item: Perturbations,
        frames: int,
        hit: Bool[Array, " l"],
        outputs: Mapping[str, Calls],
        run: Mapping[str, Calls],
    ):
        self.number = {path: i for i, path in enumerate(spec.paths)}
        self.once = {path for path, calls in outputs.items() if len(calls) == 1}
        self.item, self.frames, self.hit = item, frames, hit
        # Of each part's calls, here and in the rounds of a loop.
        self.outputs, self.run = outputs, run
        self.made: collections.Counter[str] = collections.Counter()
        self.counting = False

    def call(self, path: str, inner: Any, *args: Any) -> Any:
        here = self.made[path]
        self.made[path] += 1
        if self.counting:
            return inner(*args)
        y = run_or_reuse(self.run[path][here], inner, args, self.outputs[path][here])
        if path not in self.number:
            return y
        change = functools.partial(self._changed, path)
        return jax.lax.cond(self.hit[self.number[path]], change, lambda x, y: y, *args, y)

    def loop(self, body: Round, start: Any, times: int) -> Any:
        outputs, run, made = self.outputs, self.run, self.made
        self.made, self.counting = collections.Counter(), True
        jax.eval_shape(lambda x: body(x, jnp.int32(0)), start)
        each, self.counting = self.made, False

        def of_rounds(calls: Mapping[str, Calls]) -> dict[str, Calls]:
            return {p: rounds_of(calls[p][made[p] :], n, times) for p, n in each.items()}

        def one_round(x: Any, numbered: tuple[Array, Any, Any]) -> tuple[Any, None]:
            number, self.outputs, self.run = numbered
            self.made = collections.Counter()
            return body(x, number), None

        scanned = jnp.arange(times), of_rounds(outputs), of_rounds(run)
        end, _ = jax.lax.scan(one_round, start, scanned)
        self.outputs, self.run = outputs, run
        self.made = made + collections.Counter({p: n * times for p, n in each.items()})
        return end

    def _changed(self, path: str, x: Array, y: Array) -> Array:
        """The layer's output, with the perturbation if it is this layer's."""
        item = self.item
        if path in self.once:
            added = item.change[:, : y.size // y.shape[-1] // self.frames]
        else:
            row = item.row[: x.shape[-1]]
            x = x.astype(row.dtype)
            added = jnp.matmul(x, row, precision=jax.lax.Precision.HIGHEST) + item.bias
        added = added.reshape(y.shape[:-1]).astype(y.dtype)
        channel = jnp.where(item.layer == self.number[path], item.channel, -1)
        at = jnp.arange(y.shape[-1]).reshape((1,) * (y.ndim - 1) + (-1,)) == channel
        return y + jnp.where(at, added[..., None], 0)
