"""The measured joint action error of many candidate allocations, for searches.

Quantized rows do not depend on each other, so every row under every option is computed once, and a
candidate is a selection. That takes n times the memory of the quantized weights, which suits small
policies.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.families.layout import Layout
from qvla_jax.inference.policy import Policy
from qvla_jax.quantization.bias import corrected_bias
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.layers import LayerRules, quantizable_layers
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.table import SensitivityTable


class Layer(TypedDict):
    """A layer's arrays: those of one allocation, or with a leading axis n those of all options."""

    kernel: Float[Array, "k c"]
    bias: Float[Array, " c"]


class ActionErrorObjective:
    """`objective(choices[p, C]) -> f64[p]`: squared error of the normalized chunk, summed over it.

    The mean over the frames of || A_choice(x) - A*(x) ||^2, in the unit of the sensitivities: what
    the robot executes counts. The allocations are those of `quantize(policy, allocate(table,
    ...))`, in floating point.
    """

    def __init__(
        self,
        policy: Policy,
        frames: Calibration,
        table: SensitivityTable,
        *,
        batch: int = 64,
        at_once: int = 1,
        rules: LayerRules | None = None,
    ):
        """Quantizes every row under every option, and runs the full-precision policy.

        Args:
            policy: the full-precision policy.
            frames: frames to measure on, never those that results are reported on.
            table: options, channels and quantizer.
            batch: frames at a time.
            at_once: candidates that are vmapped, each with a copy of the quantized weights.
            rules: the table's rules; None takes those of the policy's layout.

        Raises:
            InputError: the table belongs to another policy or lacks the statistics of its
                quantizer, or there are no frames.
        """
        if table.provenance.get("policy", policy.fingerprint) != policy.fingerprint:
            raise InputError("the sensitivity table was measured on another policy")
        self.policy, self.table, self._at_once = policy, table, at_once
        self._mesh = sharding.data_mesh()
        model = nnx.merge(*nnx.split(policy.model))
        rules = policy.layout.rules if rules is None else rules
        layers = quantizable_layers(model, rules)
        self.options = {
            layer.path: self._all_options(layers[layer.path], layer.path, layer.source_bytes)
            for layer in table.index.layers
        }
        self._source = {
            path: Layer(
                kernel=layers[path].kernel[...].astype(jnp.float32), bias=_plain_bias(layers[path])
            )
            for path in self.options
        }
        put_layers(layers, self._source)
        self._model, self._rules = model, rules
        self._take(frames, batch)

    def on(self, frames: Calibration, *, batch: int = 64) -> "ActionErrorObjective":
        """The same allocations measured on other frames; the quantized rows are shared."""
        other = copy.copy(self)
        other._take(frames, batch)
        return other

    def _take(self, frames: Calibration, batch: int) -> None:
        self._inputs: list[tuple[Any, int]] = []
        for observations in frames.batches(batch):
            prepared = jax.tree.map(np.asarray, self.policy.prepare(observations))
            self._inputs.append(sharding.pad_batch(prepared, min(batch, frames.frames)))
        if not self._inputs:
            raise InputError("there are no frames to measure on")
        # Use the same program as for the candidates, for equal rounding on both sides.
        self.reference = self._chunks([self._source] * self._at_once)[0]

    @property
    def frames(self) -> int:
        """Frames that errors are means over."""
        return sum(count for _, count in self._inputs)

    def __call__(self, choices: Int[np.ndarray, "p C"]) -> Float[np.ndarray, " p"]:
        """Mean squared chunk error of each candidate."""
        return self.frame_errors(choices).mean(axis=1)

    def frame_errors(self, choices: Int[np.ndarray, "p C"]) -> Float[np.ndarray, "p N"]:
        """Squared chunk error of each candidate in each frame.

        For every p, a device call measures `at_once` candidates on a batch of frames, and a
        candidate's error does not depend on the others in the call.
        """
        padded, count = sharding.pad_batch(np.atleast_2d(choices), self._at_once)
        found = [
            self._chunks([self.select(c) for c in padded[start : start + self._at_once]])
            for start in range(0, len(padded), self._at_once)
        ]
        change = np.concatenate(found)[:count].astype(np.float64) - self.reference
        return np.sum(self.policy.layout.executed(change) ** 2, axis=(2, 3))

    def select(self, choice: Int[np.ndarray, " C"]) -> dict[str, Layer]:
        """The quantized layers' arrays under a choice."""
        rows = {layer.path: rows for layer, rows in self.table.index.items()}
        chosen = {path: jnp.asarray(choice[rows[path]], jnp.int32) for path in self.options}
        return _select(self.options, chosen)

    def gradient(self, choice: Int[np.ndarray, " C"]) -> dict[str, Layer]:
        """Derivative of the error with respect to the quantized layers' arrays at a choice."""
        selected = self.select(choice)
        graphdef, state = nnx.split(self._model)
        spec, start = (graphdef, self._rules, self.policy.layout), 0
        total: Any = None
        for inputs, count in self._inputs:
            placed = self.policy.complete(sharding.shard_batch(self._mesh, inputs))
            size = len(jax.tree.leaves(inputs)[0])
            target = np.zeros((size, *self.reference.shape[1:]), np.float32)
            target[:count] = self.reference[start : start + count]
            real = (np.arange(size) < count).astype(np.float32)
            with jax.default_matmul_precision("float32"):
                part = _gradient(spec, state, selected, placed, jnp.asarray(target), real)
            # The gradients of the devices' shares are summed by a collective. XLA's CPU client
            # deadlocks if one device waits there while the other's queue (32 programs) fills up
            # with additions.
            jax.block_until_ready(part)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            start += count
        return jax.tree.map(lambda g: g / self.frames, total)

    def model(self, choice: Int[np.ndarray, " C"]) -> Any:
        """The policy's network under a choice."""
        model = nnx.merge(*nnx.split(self._model))
        put_layers(quantizable_layers(model, self._rules), self.select(choice))
        return model

    def _chunks(self, networks: Sequence[dict[str, Layer]]) -> Float[np.ndarray, "p N h a"]:
        """Action chunks of `at_once` networks, given by their quantized layers' arrays."""
        arrays = jax.tree.map(lambda *each: jnp.stack(each), *networks)
        graphdef, state = nnx.split(self._model)
        spec, found = (graphdef, self._rules, self._mesh), []
        for inputs, count in self._inputs:
            padded, _ = sharding.pad_batch(inputs, self._mesh.size)
            placed = sharding.shard_batch(self._mesh, padded)
            with jax.default_matmul_precision("float32"):
                found.append(np.asarray(_forward(spec, state, arrays, placed))[:, :count])
        return np.concatenate(found, axis=1)

    def _all_options(self, linear: nnx.Linear, path: str, source_bytes: int) -> Layer:
        """The result of `quantize` for a layer's rows and biases, under each option."""
        weight = linear.kernel[...].T
        quantizer = self.table.quantizer
        changes = quantizer.row_changes(path, weight, self.table.bits)
        rows = weight.astype(jnp.float32)[None] + changes
        old = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
        plain = _plain_bias(linear)
        mean = quantizer.mean(path)
        biases = []
        for bits, row in zip(self.table.bits, rows, strict=True):
            bias = plain
            if mean is not None and bits != SOURCE:
                bias = corrected_bias(weight, row, jnp.asarray(mean, jnp.float32), old)
                if source_bytes == 2:  # a bias is stored in the source dtype
                    bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
            biases.append(bias)
        return Layer(kernel=jnp.swapaxes(rows, 1, 2), bias=jnp.stack(biases))


def put_layers(layers: Mapping[str, nnx.Linear], arrays: Mapping[str, Layer]) -> None:
    """Puts arrays into a model's layers."""
    for path, layer in arrays.items():
        layers[path].kernel = nnx.Param(layer["kernel"])
        layers[path].bias = nnx.Param(layer["bias"])
        layers[path].use_bias = True


def _plain_bias(linear: nnx.Linear) -> Float[Array, " c"]:
    if linear.bias is None:
        return jnp.zeros(linear.kernel.shape[1], jnp.float32)
    return linear.bias[...].astype(jnp.float32)


@jax.jit
def _select(options: dict[str, Layer], chosen: dict[str, Array]) -> dict[str, Layer]:
    def of_layer(path: str) -> Layer:
        kernel, bias = options[path]["kernel"], options[path]["bias"]
        index = chosen[path]
        return Layer(
            kernel=jnp.take_along_axis(kernel, index[None, None], axis=0)[0],
            bias=jnp.take_along_axis(bias, index[None], axis=0)[0],
        )

    return {path: of_layer(path) for path in options}


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    spec: tuple[nnx.GraphDef[Any], LayerRules, jax.sharding.Mesh],
    state: nnx.State,
    arrays: dict[str, Layer],
    inputs: Any,
) -> Float[Array, "p b h a"]:
    """Each device takes its share of the frames, as in `Policy.run`."""
    graphdef, rules, mesh = spec

    def actions(state: nnx.State, arrays: dict[str, Layer], inputs: Any) -> Array:
        def of_candidate(arrays: dict[str, Layer]) -> Array:
            model = nnx.merge(graphdef, state)
            put_layers(quantizable_layers(model, rules), arrays)
            return model.actions(inputs)

        return jax.vmap(of_candidate)(arrays)

    whole = PartitionSpec()
    return jax.shard_map(
        actions,
        mesh=mesh,
        in_specs=(whole, whole, PartitionSpec(sharding.DATA_AXIS)),
        out_specs=PartitionSpec(None, sharding.DATA_AXIS),
        check_vma=False,
    )(state, arrays, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    spec: tuple[nnx.GraphDef[Any], LayerRules, Layout],
    state: nnx.State,
    selected: dict[str, Layer],
    inputs: Any,
    reference: Float[Array, "b h a"],
    real: Float[Array, " b"],
) -> dict[str, Layer]:
    graphdef, rules, layout = spec

    def error(arrays: dict[str, Layer]) -> Array:
        model = nnx.merge(graphdef, state)
        put_layers(quantizable_layers(model, rules), arrays)
        change = layout.executed(model(inputs) - reference)
        square = jnp.sum(jnp.square(change), axis=(1, 2))
        return jnp.sum(square * real)

    return jax.grad(error)(selected)
