"""The measured joint action error of many candidate allocations, for searches.

Quantized rows do not depend on each other, so every row under every option is computed once, and a
candidate is a select. That takes n times the memory of the quantized weights: small policies.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.quantization.bias import corrected_bias
from qvla_jax.quantization.grid import SOURCE
from qvla_jax.quantization.layers import DEFAULT_RULES, LayerRules, quantizable_layers
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.table import SensitivityTable


class Layer(TypedDict):
    """A layer's arrays: those of one allocation, or with a leading axis n those of all options."""

    kernel: Float[Array, "k c"]
    bias: Float[Array, " c"]


class ActionErrorObjective:
    """`objective(choices[p, C]) -> f64[p]`: squared error of the normalized chunk, summed over it.

    The mean over the frames of || A_choice(x) - A*(x) ||^2, in the unit of the sensitivities. The
    allocations are those of `quantize(policy, table.bits_of(...))`, in floating point.
    """

    def __init__(
        self,
        policy: Policy,
        frames: Calibration,
        table: SensitivityTable,
        *,
        batch: int = 64,
        at_once: int = 1,
        rules: LayerRules = DEFAULT_RULES,
    ):
        """Quantizes every row under every option, and runs the full-precision policy.

        Args:
            policy: the full-precision policy.
            frames: frames to measure on. Never those that results are reported on.
            table: options, channels and quantizer.
            batch: frames at a time.
            at_once: candidates that are vmapped; the others of a call follow one after another.
            rules: those of the table.

        Raises:
            InputError: the table belongs to another policy or lacks the statistics of its
                quantizer, or there are no frames.
        """
        if table.provenance.get("policy", policy.fingerprint) != policy.fingerprint:
            raise InputError("the sensitivity table was measured on another policy")
        self.policy, self.table, self._at_once = policy, table, at_once
        self._mesh = sharding.data_mesh()
        self._take(frames, batch)
        model = nnx.merge(*nnx.split(policy.model))
        layers = quantizable_layers(model, rules)
        self.options = {
            layer.path: self._all_options(layers[layer.path], layer.path, layer.source_bytes)
            for layer in table.index.layers
        }
        for path in self.options:
            layers[path].bias = nnx.Param(self.options[path]["bias"][0])
            layers[path].use_bias = True
        self._model, self._rules = model, rules

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
        self.reference = self._chunks(self.policy)

    @property
    def frames(self) -> int:
        """Frames that errors are means over."""
        return sum(count for _, count in self._inputs)

    def __call__(self, choices: Int[np.ndarray, "p C"]) -> Float[np.ndarray, " p"]:
        """Mean squared chunk error of each candidate; one call of the device for a batch of frames.

        `at_once` candidates run side by side, each with a copy of the quantized weights.
        """
        choices = np.atleast_2d(choices)
        chosen = self._chosen(choices)
        graphdef, state = nnx.split(self._model)
        spec, start = (graphdef, self._rules, self._mesh, self._at_once), 0
        total = np.zeros(len(choices))
        for inputs, count in self._inputs:
            padded, _ = sharding.pad_batch(inputs, self._mesh.size)
            reference = np.zeros((len(jax.tree.leaves(padded)[0]), *self.reference.shape[1:]))
            reference[:count] = self.reference[start : start + count]
            placed = sharding.shard_batch(self._mesh, (padded, reference.astype(np.float32)))
            with jax.default_matmul_precision("float32"):
                errors = _candidate_errors(spec, state, self.options, chosen, *placed)
            total += np.asarray(errors, np.float64)[:, :count].sum(axis=1)
            start += count
        return total / self.frames

    def frame_errors(self, choice: Int[np.ndarray, " C"]) -> Float[np.ndarray, " N"]:
        """Squared chunk error of one candidate in each frame."""
        change = self._chunks(self.policy.replace(model=self.model(choice))).astype(np.float64)
        return np.sum((change - self.reference) ** 2, axis=(1, 2))

    def select(self, choice: Int[np.ndarray, " C"]) -> dict[str, Layer]:
        """The quantized layers' arrays under a choice."""
        return _select(self.options, self._chosen(choice))

    def _chosen(self, choices: Int[np.ndarray, "*p C"]) -> dict[str, Int[Array, "*p c"]]:
        rows = {layer.path: rows for layer, rows in self.table.index.items()}
        return {path: jnp.asarray(choices[..., rows[path]], jnp.int32) for path in self.options}

    def gradient(self, choice: Int[np.ndarray, " C"]) -> dict[str, Layer]:
        """Derivative of the error with respect to the quantized layers' arrays at a choice."""
        selected = self.select(choice)
        graphdef, state = nnx.split(self._model)
        spec, start = (graphdef, self._rules), 0
        total: Any = None
        for inputs, count in self._inputs:
            placed = self.policy.complete(sharding.shard_batch(self._mesh, inputs))
            size = len(jax.tree.leaves(inputs)[0])
            target = np.zeros((size, *self.reference.shape[1:]), np.float32)
            target[:count] = self.reference[start : start + count]
            real = (np.arange(size) < count).astype(np.float32)
            with jax.default_matmul_precision("float32"):
                part = _gradient(spec, state, selected, placed, jnp.asarray(target), real)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            start += count
        return jax.tree.map(lambda g: g / self.frames, total)

    def model(self, choice: Int[np.ndarray, " C"]) -> Any:
        """The policy's network under a choice."""
        model = nnx.merge(*nnx.split(self._model))
        put_layers(quantizable_layers(model, self._rules), self.select(choice))
        return model

    def _chunks(self, policy: Policy) -> Float[np.ndarray, "N h a"]:
        return np.concatenate([policy.run(inputs)[:count] for inputs, count in self._inputs])

    def _all_options(self, linear: nnx.Linear, path: str, source_bytes: int) -> Layer:
        """What `quantize` makes of a layer's rows and biases, for each option."""
        weight = linear.kernel[...].T
        quantizer = self.table.quantizer
        changes = quantizer.row_changes(path, weight, self.table.bits)
        rows = weight.astype(jnp.float32)[None] + changes
        old = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
        plain = jnp.zeros(len(weight), jnp.float32) if old is None else old
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
def _candidate_errors(
    spec: tuple[nnx.GraphDef[Any], LayerRules, jax.sharding.Mesh, int],
    state: nnx.State,
    options: dict[str, Layer],
    chosen: dict[str, Int[Array, "p c"]],
    inputs: Any,
    reference: Float[Array, "b h a"],
) -> Float[Array, "p b"]:
    """Squared chunk error of every candidate in every frame; each device takes its frames."""
    graphdef, rules, mesh, at_once = spec

    def of_frames(
        state: nnx.State,
        options: dict[str, Layer],
        chosen: dict[str, Array],
        inputs: Any,
        reference: Array,
    ) -> Array:
        def of_candidate(chosen: dict[str, Array]) -> Array:
            model = nnx.merge(graphdef, state)
            put_layers(quantizable_layers(model, rules), _select(options, chosen))
            return jnp.sum(jnp.square(model.actions(inputs) - reference), axis=(1, 2))

        return jax.lax.map(of_candidate, chosen, batch_size=at_once)

    whole, frames = PartitionSpec(), PartitionSpec(sharding.DATA_AXIS)
    return jax.shard_map(
        of_frames,
        mesh=mesh,
        in_specs=(whole, whole, whole, frames, frames),
        out_specs=PartitionSpec(None, sharding.DATA_AXIS),
        check_vma=False,
    )(state, options, chosen, inputs, reference)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    spec: tuple[nnx.GraphDef[Any], LayerRules],
    state: nnx.State,
    selected: dict[str, Layer],
    inputs: Any,
    reference: Float[Array, "b h a"],
    real: Float[Array, " b"],
) -> dict[str, Layer]:
    graphdef, rules = spec

    def error(arrays: dict[str, Layer]) -> Array:
        model = nnx.merge(graphdef, state)
        put_layers(quantizable_layers(model, rules), arrays)
        square = jnp.sum(jnp.square(model(inputs) - reference), axis=(1, 2))
        return jnp.sum(square * real)

    return jax.grad(error)(selected)
