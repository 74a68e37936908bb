"""Exact sensitivities: one forward pass per (channel, bits), in batches.

    S[l, c, n] = E_x || A_{l,c}^{(n)}(x) - A*(x) ||^2          (QVLA, arXiv 2602.03782)

A_{l,c}^{(n)} is the action chunk when only channel c of layer l is quantized. Quantizing a row
changes one output channel by dY[t] = (x_t - E[x]) . (w_hat - w), which is added to the layer's
output in each of its calls, so no weight matrix is copied. A block of perturbations is vmapped over
a batch of frames, in the order in which the network first calls their layers, so that only what
follows the first of them is replayed.

Which perturbations share a block, and the shapes that a device works on, do not depend on the mesh:
every device along `channel` takes its own block, every device along `data` its own batch. The
sweep's result is therefore bit-for-bit identical on every mesh.
"""

import collections
import functools
import itertools
from collections.abc import Collection
from typing import Any, Final

import jax
import numpy as np
from flax import nnx

from qvla_jax import sharding
from qvla_jax.array_typing import Float, Int
from qvla_jax.sensitivity.accumulate import FrameMean
from qvla_jax.sensitivity.batches import FrameBatch
from qvla_jax.sensitivity.instrument import Calls
from qvla_jax.sensitivity.replay import (
    BY_CHANNEL,
    SPLIT_PERTURBATIONS,
    Perturbations,
    ReplaySpec,
    order_of,
    replay,
    unperturbed,
)
from qvla_jax.sensitivity.stages import Order, downstream, part_paths
from qvla_jax.sensitivity.store import NOTHING_KEPT, digest_of
from qvla_jax.sensitivity.sweep import Sweep

# Multiples of a part's largest output: inputs, outputs and temporaries of the widest layer or
# attention.
_ALIVE: Final = 8
# Larger blocks gain nothing.
_LARGEST_BLOCK: Final = 16
# Blocks per item: the most that a killed sweep can lose.
_BLOCKS: Final = 32


def exact_costs(
    sweep: Sweep, *, rows: Int[np.ndarray, " m"] | None = None, block: int | None = None
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, "m n"]]:
    """Measured sensitivities of some channels, and their standard errors over frames.

    Args:
        sweep: what to work with; its policy is in full precision.
        rows: rows of the table to measure; None measures all.
        block: perturbations at a time on each device, one of which is the zero perturbation; None
            takes as many as fit in the sweep's `memory`, within bounds.

    Raises:
        InputError: the set is empty, an action is not finite, or a layer serves all frames of a
            batch together.
    """
    rows = np.arange(len(sweep.index)) if rows is None else np.asarray(rows)
    mesh, size, bits = sweep.mesh, sweep.batch_size, sweep.bits
    policy, paths = sweep.policy, sweep.index.paths
    graphdef, state = nnx.split(policy.model)
    spec = ReplaySpec(graphdef, paths, part_paths(policy.model, policy.layout, paths), mesh)
    state = sharding.replicate(mesh, state)
    batches = sweep.batches()
    first = next(batches)
    if block is None:
        share = size // mesh.shape[sharding.DATA_AXIS]
        block = _block_size(spec, state, first, share, sweep.memory)
    prober = _Prober(sweep, spec, state, rows, max(block, 2))
    items = NOTHING_KEPT
    if sweep.store is not None:
        items = sweep.items(method="exact", bits=list(bits), rows=digest_of(rows), block=block)
    root = 1.0 if sweep.weights is None else np.sqrt(np.asarray(sweep.weights, np.float64))
    result, each = FrameMean(), len(rows) * len(bits)
    total = each * -(-sweep.calibration.frames // size)
    sweep.progress("exact", 0, total)
    for number, frames in enumerate(itertools.chain([first], batches)):
        done, batch_costs = number * each, np.zeros((frames.count, each))
        base = _Unperturbed(spec, state, frames)
        for part, samples in enumerate(prober.parts(frames)):
            measure = functools.partial(prober.squares, base, samples, root)
            batch_costs[:, samples] = items.get(f"batch{number:06d}-part{part:06d}", measure)
            done += len(samples)
            sweep.progress("exact", done, total)
        result.add(batch_costs.reshape(frames.count, len(rows), len(bits)))
        # Channels that no action reads are not probed.
        sweep.progress("exact", (number + 1) * each, total)
    return result.mean, result.standard_error


def _block_size(
    spec: ReplaySpec, state: nnx.State, batch: FrameBatch, frames: int, memory: int
) -> int:
    """Number of perturbations whose activations fit in `memory` for a device's frames.

    Assumes that live arrays take a fixed multiple of a part's largest output.
    """
    outputs, _ = jax.eval_shape(functools.partial(unperturbed, spec), state, batch.inputs)
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(outputs)) / len(batch.frames)
    return int(np.clip(memory // (_ALIVE * largest * frames), 2, _LARGEST_BLOCK))


class _Unperturbed:
    """A batch and its unperturbed pass, from which all replays start; computed on request."""

    def __init__(self, spec: ReplaySpec, state: nnx.State, batch: FrameBatch):
        self.batch = batch
        self._spec, self._state = spec, state
        self._last: tuple[str, np.ndarray] | None = None

    @functools.cached_property
    def _arrays(self) -> tuple[dict[str, Calls], dict[str, jax.Array]]:
        return unperturbed(self._spec, self._state, self.batch.inputs)

    @property
    def outputs(self) -> dict[str, Calls]:
        """Of the parts."""
        return self._arrays[0]

    @property
    def tokens(self) -> int:
        """The maximum number of tokens per frame of any layer that is called once."""
        once = [x.shape[1] for path, x in self._arrays[1].items() if len(self.outputs[path]) == 1]
        return max(once, default=0)

    def input(self, path: str) -> Float[np.ndarray, "b T k"]:
        """Input of a layer; layers are requested one after another."""
        if self._last is None or self._last[0] != path:
            self._last = path, sharding.to_host(self._arrays[1][path]).astype(np.float32)
        return self._last[1]


class _Prober:
    """Measures the action's change under each perturbation of a batch.

    A perturbation is identified by its number, row-major over `rows` and `bits`.
    """

    def __init__(
        self,
        sweep: Sweep,
        spec: ReplaySpec,
        state: nnx.State,
        rows: Int[np.ndarray, " m"],
        block: int,
    ):
        self.spec, self.state, self.block = spec, state, block
        self.layers, self.index, self.quantizer = sweep.layers, sweep.index, sweep.quantizer
        self.bits, self.rows, self.layout = sweep.bits, rows, sweep.policy.layout
        self.steps = sweep.steps
        self.order: Order | None = None
        self.changes: dict[str, np.ndarray] = {}
        # Layer -> the calls of parts that run again behind it.
        self.behind: dict[str, frozenset[tuple[str, int]]] = {}

    def parts(self, batch: FrameBatch) -> list[Int[np.ndarray, " p"]]:
        """Perturbations of all reached layers in the order of execution, one item at a time."""
        numbers = {path: i for i, path in enumerate(self.spec.paths)}
        layer_of = np.repeat(self.index.layer_of[self.rows], len(self.bits))
        ordered = [
            np.flatnonzero(layer_of == numbers[path])
            for path in dict.fromkeys(self._order(batch).paths)
            if path in numbers
        ]
        whole = np.concatenate([np.zeros(0, np.int64), *ordered])
        size = _BLOCKS * (self.block - 1)
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    def squares(
        self, base: _Unperturbed, samples: Int[np.ndarray, " p"], root: float | np.ndarray
    ) -> Float[np.ndarray, "b p"]:
        """|| root (A - A*) ||^2 of the batch's real frames, over the steps that count, in float64.

        Args:
            base: the batch.
            samples: perturbations.
            root: square root of the weight of each action dimension.
        """
        each = self.block - 1
        blocks = [samples[start : start + each] for start in range(0, len(samples), each)]
        devices = self.spec.mesh.shape[sharding.CHANNEL_AXIS]
        found = []
        for start in range(0, len(blocks), devices):
            together = blocks[start : start + devices]
            idle = [samples[:0]] * (devices - len(together))
            actions = self._replay(base, together + idle)[:, :, : base.batch.count]
            for block, of_block in zip(together, actions, strict=False):
                # Compare with the zero perturbation of the same program, for equal rounding on both
                # sides.
                change = (of_block[1 : len(block) + 1] - of_block[:1])[:, :, : self.steps] * root
                found.append(np.sum(change**2, axis=(2, 3)).T)
        return np.concatenate(found, axis=1)

    def _replay(
        self, base: _Unperturbed, blocks: list[Int[np.ndarray, " p"]]
    ) -> Float[np.ndarray, "d p b h a"]:
        """Action chunks in float64, one block for each device along `channel`."""
        mesh, order = self.spec.mesh, self._order(base.batch)
        hits = [
            {self.spec.paths[i] for i in self.index.layer_of[self._row(block)]} for block in blocks
        ]
        needed = [self._downstream(order, paths) for paths in hits]
        run, hit = jax.tree.map(
            lambda flags: sharding.put(mesh, flags, BY_CHANNEL),
            (
                {
                    part: np.asarray(
                        [[(part, call) in of_block for call in range(calls)] for of_block in needed]
                    )
                    for part, calls in collections.Counter(order.paths).items()
                },
                np.asarray([[path in paths for path in self.spec.paths] for paths in hits]),
            ),
        )
        perturbations = jax.tree.map(
            lambda spec, *parts: sharding.put(mesh, np.concatenate(parts), spec),
            SPLIT_PERTURBATIONS,
            *(self._pack(base, block) for block in blocks),
        )
        actions = replay(
            self.spec, self.state, base.batch.inputs, base.outputs, run, hit, perturbations
        )
        host = sharding.to_host(actions).astype(np.float64)
        return host.reshape(len(blocks), self.block, *host.shape[1:])

    def _downstream(self, order: Order, layers: Collection[str]) -> frozenset[tuple[str, int]]:
        """The union over the layers, each of which is looked up once."""
        for layer in layers:
            if layer not in self.behind:
                self.behind[layer] = downstream(order, [layer], self.layout)
        return frozenset().union(*(self.behind[layer] for layer in layers))

    def _pack(self, base: _Unperturbed, block: Int[np.ndarray, " p"]) -> Perturbations:
        """The zero perturbation first, and zeros as padding of a short block."""
        layer = np.zeros(self.block, np.int32)
        channel = np.full(self.block, -1, np.int32)
        change = np.zeros((self.block, len(base.batch.frames), base.tokens), np.float32)
        row = np.zeros((self.block, self._widest(base.batch)), np.float32)
        bias = np.zeros(self.block, np.float32)
        rows = self._row(block)
        layer[1 : len(rows) + 1] = self.index.layer_of[rows]
        channel[1 : len(rows) + 1] = self.index.channel[rows]
        for number in dict.fromkeys(layer[1 : len(rows) + 1].tolist()):
            path = self.spec.paths[number]
            slots = 1 + np.flatnonzero(layer[1 : len(rows) + 1] == number)
            changes = self._changes(path, block[slots - 1])
            mean = self.quantizer.mean(path)
            if len(base.outputs[path]) > 1:
                row[slots, : changes.shape[1]] = changes
                bias[slots] = 0 if mean is None else -changes @ mean.astype(np.float32)
                continue
            x = base.input(path)
            if mean is not None:
                x = x - mean.astype(np.float32)
            dy = x @ changes.T
            change[slots, :, : dy.shape[1]] = np.moveaxis(dy, -1, 0)
        arrays: Any = dict(layer=layer, channel=channel, change=change, row=row, bias=bias)
        return Perturbations(**arrays)

    def _widest(self, batch: FrameBatch) -> int:
        """The largest fan-in of the layers that are called several times."""
        calls = collections.Counter(self._order(batch).paths)
        fan_in = {layer.path: layer.fan_in for layer in self.index.layers}
        return max((fan_in[path] for path in self.spec.paths if calls[path] > 1), default=0)

    def _row(self, samples: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        return self.rows[samples // len(self.bits)]

    def _changes(self, path: str, samples: Int[np.ndarray, " p"]) -> Float[np.ndarray, "p k"]:
        """w_hat - w of these perturbations of a layer, whose rows are quantized once."""
        rows = np.sort(self.rows[self.index.layer_of[self.rows] == self.spec.paths.index(path)])
        if path not in self.changes:
            # Quantize the whole layer: few shapes, so few compilations.
            weight = self.layers[path].kernel[...].T
            whole = np.asarray(self.quantizer.row_changes(path, weight, self.bits))
            self.changes[path] = whole[:, self.index.channel[rows]]
        place = np.searchsorted(rows, self._row(samples))
        return self.changes[path][samples % len(self.bits), place]

    def _order(self, batch: FrameBatch) -> Order:
        """The calls of all parts that the forward pass reaches."""
        if self.order is None:
            self.order = order_of(self.spec, self.state, batch.inputs)
        return self.order
