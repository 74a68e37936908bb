"""Exact sensitivities: one forward pass for each (channel, bits), in batches.

    S[l, c, n] = E_x || A_{l,c}^{(n)}(x) - A*(x) ||^2          (QVLA, arXiv 2602.03782)

A_{l,c}^{(n)} is the action chunk when only channel c of layer l is quantized. Quantizing a row
changes one output channel by dY[t] = (x_t - E[x]) . (w_hat - w), which is added to the layer's
output, so no weight matrix is copied. A block of perturbations is vmapped over a batch of frames,
sorted by depth so that only the stages behind the shallowest of them are replayed.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Float, Int
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.quantizer import Quantizer
from qvla_jax.sensitivity.accumulate import FrameMean
from qvla_jax.sensitivity.batches import (
    Calibration,
    FrameBatch,
    ModelPolicy,
    batch_size,
    frame_batches,
)
from qvla_jax.sensitivity.replay import (
    Perturbations,
    ReplaySpec,
    Trace,
    record,
    replay,
    unperturbed,
)
from qvla_jax.sensitivity.stages import downstream, stage_paths
from qvla_jax.sharding import data_mesh, replicate

# Sample number, layer number, channel, and what is added to its output [b, T].
_Item = tuple[int, int, int, np.ndarray]


def exact_costs(
    policy: ModelPolicy,
    calibration: Calibration,
    layers: Mapping[str, nnx.Linear],
    index: ChannelIndex,
    quantizer: Quantizer,
    *,
    bits: tuple[int, ...],
    rows: Int[np.ndarray, " m"] | None = None,
    batch: int = 8,
    block: int = 16,
    weights: np.ndarray | None = None,
    progress: Progress = no_progress,
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, "m n"]]:
    """Measured sensitivities of some channels, and their standard errors over frames.

    Args:
        policy: the full-precision policy.
        calibration: frames x.
        layers: path -> layer in the order of `index`.
        index: the channels.
        quantizer: the one whose changes are measured.
        bits: options, without 16.
        rows: rows of the table to measure; None measures all.
        batch: frames at a time.
        block: perturbations at a time, one of which is the zero perturbation.
        weights: weight of each action dimension.
        progress: called with the perturbations done.

    Raises:
        InputError: the set is empty, or an action is not finite.
    """
    rows = np.arange(len(index)) if rows is None else np.asarray(rows)
    mesh = data_mesh()
    size = batch_size(calibration.frames, batch, mesh)
    graphdef, state = nnx.split(policy.model)
    state = replicate(mesh, state)
    spec = ReplaySpec(graphdef, tuple(layers), stage_paths(policy.model), mesh)
    prober = _Prober(spec, state, layers, index, quantizer, bits, rows, block)
    root = 1.0 if weights is None else np.sqrt(np.asarray(weights, np.float64))
    result, each = FrameMean(), len(rows) * len(bits)
    total = each * -(-calibration.frames // size)
    progress("exact", 0, total)
    for number, item in enumerate(frame_batches(policy, calibration, size, mesh)):
        done = number * each
        costs = np.zeros((item.count, len(rows), len(bits)))
        for samples, change in prober.measure(item):
            squares = np.sum((change[:, : item.count] * root) ** 2, axis=(2, 3))
            costs.reshape(item.count, -1)[:, samples] = squares.T
            done += len(samples)
            progress("exact", done, total)
        result.add(costs)
        # Channels that no action reads are not probed.
        progress("exact", (number + 1) * each, total)
    return result.mean, result.standard_error


class _Prober:
    """Measures the action's change under each perturbation on one batch after another."""

    def __init__(
        self,
        spec: ReplaySpec,
        state: nnx.State,
        layers: Mapping[str, nnx.Linear],
        index: ChannelIndex,
        quantizer: Quantizer,
        bits: tuple[int, ...],
        rows: Int[np.ndarray, " m"],
        block: int,
    ):
        self.spec, self.state, self.block = spec, state, max(block, 2)
        self.layers, self.index, self.quantizer = layers, index, quantizer
        self.bits, self.rows = bits, rows
        self.trace: Trace | None = None
        self.changes: dict[str, np.ndarray] = {}

    def measure(
        self, batch: FrameBatch
    ) -> Iterator[tuple[Int[np.ndarray, " p"], Float[np.ndarray, "p b h a"]]]:
        """Yields sample numbers (row-major over rows and bits) and A - A* in float64."""
        trace = self._trace(batch)
        outputs, inputs = unperturbed(self.spec, self.state, batch.inputs)
        tokens = max(x.shape[1] for x in inputs.values())
        items = self._items(trace, inputs)
        while chunk := list(itertools.islice(items, self.block - 1)):
            paths = {self.spec.paths[layer] for _, layer, _, _ in chunk}
            run = downstream(trace.order, trace.positions, sorted(paths))
            actions = replay(
                self.spec,
                self.state,
                batch.inputs,
                outputs,
                run,
                self._pack(chunk, tokens, len(batch.frames)),
            )
            # Against the zero perturbation of the same program: equal rounding on both sides.
            host = np.asarray(actions, np.float64)
            yield np.asarray([item[0] for item in chunk]), host[1 : len(chunk) + 1] - host[:1]

    def _trace(self, batch: FrameBatch) -> Trace:
        if self.trace is None:
            trace = Trace()

            def run(state: nnx.State, inputs: object) -> None:
                nonlocal trace
                trace = record(self.spec, state, inputs)

            jax.eval_shape(run, self.state, batch.inputs)
            self.trace = Trace(order=trace.order, positions=trace.positions)
        return self.trace

    def _items(self, trace: Trace, inputs: Mapping[str, jax.Array]) -> Iterator[_Item]:
        """Perturbations of all samples in reached layers, in the order of execution."""
        numbers = {path: i for i, path in enumerate(self.spec.paths)}
        by_depth = sorted(trace.positions, key=lambda path: (trace.positions[path], numbers[path]))
        for path in by_depth:
            layer = numbers[path]
            samples = np.flatnonzero(self.index.layer_of[self.rows] == layer)
            if not samples.size:
                continue
            channels = self.index.channel[self.rows[samples]]
            changes = self._changes(path, channels)
            x = np.asarray(inputs[path], np.float32)
            if (mean := self.quantizer.mean(path)) is not None:
                x = x - mean.astype(np.float32)
            for sample, channel, change in zip(samples, channels, changes, strict=True):
                for option, dy in enumerate(np.moveaxis(x @ change.T, -1, 0)):
                    yield int(sample) * len(self.bits) + option, layer, int(channel), dy

    def _changes(self, path: str, channels: np.ndarray) -> Float[np.ndarray, "m n k"]:
        """w_hat - w of the sampled rows of a layer, found once."""
        if path not in self.changes:
            # Of the whole layer: few shapes, so few compilations.
            weight = self.layers[path].kernel[...].T
            whole = np.asarray(self.quantizer.row_changes(path, weight, self.bits))
            self.changes[path] = np.swapaxes(whole[:, channels], 0, 1)
        return self.changes[path]

    def _pack(self, chunk: Sequence[_Item], tokens: int, frames: int) -> Perturbations:
        """One block: the zero perturbation first, zeros again where the chunk is short."""
        layer = np.zeros(self.block, np.int32)
        channel = np.full(self.block, -1, np.int32)
        change = np.zeros((self.block, frames, tokens), np.float32)
        for slot, (_, number, column, dy) in enumerate(chunk, start=1):
            layer[slot], channel[slot] = number, column
            change[slot, :, : dy.shape[1]] = dy
        return Perturbations(
            layer=jnp.asarray(layer), channel=jnp.asarray(channel), change=jnp.asarray(change)
        )
