"""First-order sensitivities of all channels from s reverse passes (docs/mathematics.md section 3).

Quantizing row c of a layer changes its output by dY[t, c] = (x_t - E[x]) . (w_hat - w)_c, the
quantizer's bias correction included. To first order the action changes by
dA = sum_t J[t, c] dY[t, c], J being the derivative of the action with respect to the layer's
output. For a probe v with E[v v^T] = I

    S[c, n] = E_x || dA ||^2 = E_x E_v ( sum_t g[t, c] dY[t, c, n] )^2,     g = J^T v,

so one reverse pass per probe and one matrix product per bit-width cover all channels. With the h a
basis vectors as probes the expectation over v is exact.

`taylor` is the isotropic proxy of QVLA (arXiv 2602.03782), || J ||_F^2 || w_hat - w ||^2 = E_v
sum_t g[t, c]^2 || w_hat - w ||^2, which ignores the inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Float
from qvla_jax.mapping import release_pages
from qvla_jax.quantization.quantizer import Quantizer
from qvla_jax.sensitivity.batches import FrameBatch
from qvla_jax.sensitivity.probes import DEFAULT_PROBES, Probes, check_probes
from qvla_jax.sensitivity.reverse import (
    Contraction,
    FromCotangent,
    Probed,
    ReverseSpec,
    reverse_sweep,
)
from qvla_jax.sensitivity.stages import stage_paths
from qvla_jax.sensitivity.store import Items, digest_of
from qvla_jax.sensitivity.streaming import streamed_sweep
from qvla_jax.sensitivity.sweep import Sweep

# Tokens summed in one step on CPUs.
_TOKENS: Final = 8


class LayerConstants(TypedDict):
    """A layer's arrays: the change of every row under every option, and the mean input."""

    changes: Float[Array, "n c k"]
    mean: Float[Array, " k"]


def action_change(x: Float[Array, "b T k"], constants: LayerConstants) -> FromCotangent:
    """The `jacobian` contraction: squared first-order change of v . A, [b, n, c]."""
    changes = constants["changes"]
    options, channels, fan_in = changes.shape
    centred = x - constants["mean"][None, None]
    dy = jnp.matmul(
        centred, changes.reshape(-1, fan_in).T, precision=jax.lax.Precision.HIGHEST
    ).reshape(*x.shape[:2], options, channels)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b n c"]:
        return jnp.square(
            jax.lax.platform_dependent(g, dy, cpu=_sum_in_chunks, default=_sum_over_tokens)
        )

    return of_cotangent


def _sum_over_tokens(
    g: Float[Array, "b T c"], dy: Float[Array, "b T n c"]
) -> Float[Array, "b n c"]:
    return jnp.sum(g[:, :, None] * dy, axis=1)


def _sum_in_chunks(g: Float[Array, "b T c"], dy: Float[Array, "b T n c"]) -> Float[Array, "b n c"]:
    """The same sum, a few tokens at a time.

    XLA's CPU backend walks all tokens for one output after the other. Rows of a wide layer are a
    multiple of the cache's period apart, so every step misses it; that took two thirds of the time
    of a 7B policy's layer.
    """
    tokens = g.shape[1] // _TOKENS * _TOKENS
    total = _sum_over_tokens(g[:, tokens:], dy[:, tokens:])

    def add(i: Array, total: Array) -> Array:
        for token in range(_TOKENS):
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=_TOKENS * i + token, axis=1)
            total = total + at(g) * at(dy)[:, 0]
        return total

    return jax.lax.fori_loop(0, tokens // _TOKENS, add, total)


def isotropic_change(x: Float[Array, "b T k"], constants: LayerConstants) -> FromCotangent:
    """The `taylor` contraction: || J ||_F^2 || dw ||^2, [b, n, c]."""
    del x
    norms = jnp.sum(jnp.square(constants["changes"]), axis=-1)

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b n c"]:
        return jnp.sum(jnp.square(g), axis=1)[:, None] * norms[None]

    return of_cotangent


CONTRACTIONS: dict[str, Contraction] = {"jacobian": action_change, "taylor": isotropic_change}


def layer_constants(
    layers: Mapping[str, nnx.Linear], quantizer: Quantizer, bits: tuple[int, ...]
) -> dict[str, LayerConstants]:
    """A quantizer's effect on each layer under each of `bits`."""
    return {
        path: LayerConstants(
            changes=quantizer.row_changes(path, layer.kernel[...].T, bits),
            mean=_shift(quantizer, path, layer.kernel.shape[0]),
        )
        for path, layer in layers.items()
    }


def frame_costs(
    sweep: Sweep,
    constants: Mapping[str, LayerConstants],
    *,
    method: str = "jacobian",
    probes: Probes = DEFAULT_PROBES,
) -> Iterator[Float[np.ndarray, "b C n"]]:
    """The cost of given changes of every row at each frame, batch by batch in the set's order.

    `accumulate.mean_over_frames` turns them into sensitivities.

    Args:
        sweep: what to work with; its policy, at which the derivatives are taken, may be quantized
            already.
        constants: path -> changes of the rows and mean input, in the order of the index, from
            `layer_constants` or for moves between options.
        method: "jacobian" or "taylor".
        probes: number of Rademacher vectors, or "full".

    Returns:
        Costs, batch by batch, which may be NaN; zero for layers that no action reads.

    Raises:
        InputError: `probes` is unusable, the set is empty, or a layer serves all frames of a batch
            together.
    """
    check_probes(probes)
    mesh = sweep.mesh
    graphdef, state = nnx.split(sweep.policy.model)
    spec = ReverseSpec(
        graphdef, tuple(constants), CONTRACTIONS[method], probes, mesh, steps=sweep.steps
    )
    made_with: dict[str, Any] = {}
    if sweep.store is not None:
        changes = digest_of(*(np.asarray(c["changes"]) for c in constants.values()))
        made_with = {"changes": changes, "mesh": dict(mesh.shape), "split": sweep.split_weights}
    items = sweep.items(method=method, probes=probes, seed=sweep.seed, **made_with)
    options = len(next(iter(constants.values()))["changes"])
    place = sharding.split_weights if sweep.split_weights else sharding.replicate
    state = place(mesh, state)
    constants = {path: _put(mesh, arrays) for path, arrays in constants.items()}
    pull_back = functools.partial(reverse_sweep, spec, state, constants)
    yield from _over_batches(sweep, pull_back, options, items)


def streamed_frame_costs(
    sweep: Sweep, *, method: str = "jacobian", probes: Probes = DEFAULT_PROBES
) -> Iterator[Float[np.ndarray, "b C n"]]:
    """Like `frame_costs` of a quantizer, but moves weights to one device a stage at a time.

    Each batch quantizes a layer again when it is reached; the result of the first batch's search
    (one number per row and option) is kept.

    Args:
        sweep: what to work with; the policy's weights may be on the host or in files, and the
            inputs of all stages are kept for the frames of a batch. Its mesh is not used.
        method: "jacobian" or "taylor".
        probes: number of Rademacher vectors, or "full".

    Raises:
        InputError: see `frame_costs`; or a layer is part of no stage.
    """
    check_probes(probes)
    sweep = dataclasses.replace(sweep, mesh=sharding.one_device_mesh())
    policy, bits = sweep.policy, sweep.bits
    graphdef, state = nnx.split(policy.model)
    spec = ReverseSpec(
        graphdef, sweep.index.paths, CONTRACTIONS[method], probes, sweep.mesh, steps=sweep.steps
    )
    items = sweep.items(
        method=method, probes=probes, seed=sweep.seed, streamed=True, bits=sweep.bits
    )
    stages = stage_paths(policy.model, policy.layout)
    constants = _OnDemand(sweep.layers, sweep.quantizer, bits)
    pull_back = functools.partial(streamed_sweep, spec, stages, state, constants)
    yield from _over_batches(sweep, pull_back, len(bits), items)


class _OnDemand(Mapping[str, LayerConstants]):
    """`layer_constants`, computed on request for each layer."""

    def __init__(
        self, layers: Mapping[str, nnx.Linear], quantizer: Quantizer, bits: tuple[int, ...]
    ):
        self._layers, self._quantizer, self._bits = layers, quantizer, bits
        self._clips: dict[str, dict[int, Array]] = {}

    def __getitem__(self, path: str) -> LayerConstants:
        kernel = self._layers[path].kernel[...]
        weight = jnp.asarray(kernel.T)
        if path not in self._clips:
            self._clips[path] = self._quantizer.clips(weight, self._bits)
        changes = self._quantizer.row_changes(path, weight, self._bits, clips=self._clips[path])
        release_pages(kernel)
        return LayerConstants(changes=changes, mean=_shift(self._quantizer, path, weight.shape[1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _over_batches(
    sweep: Sweep, pull_back: Callable[[Probed], dict[str, Array]], options: int, items: Items
) -> Iterator[Float[np.ndarray, "b C n"]]:
    """A sweep's results, batch by batch in channel order; finished items are kept."""
    key = jax.random.key(sweep.seed)
    weights = None if sweep.weights is None else jnp.asarray(sweep.weights, jnp.float32)
    done = 0
    sweep.progress("sensitivity", 0, sweep.calibration.frames)
    for number, item in enumerate(sweep.batches()):

        def costs(item: FrameBatch = item) -> Float[np.ndarray, "b C n"]:
            found = pull_back(Probed(item.inputs, item.frames, key, weights))
            frames = np.zeros((item.count, len(sweep.index), options), np.float32)
            for layer, rows in sweep.index.items():
                if layer.path in found:
                    of_layer = sharding.to_host(found[layer.path])[: item.count]
                    frames[:, rows] = np.swapaxes(of_layer, 1, 2)
            return frames

        yield items.get(f"batch{number:06d}", costs)
        done += item.count
        sweep.progress("sensitivity", done, sweep.calibration.frames)


def _put(mesh: Mesh, constants: LayerConstants) -> LayerConstants:
    specs = constant_specs(mesh, constants["changes"].shape[1])
    return LayerConstants(
        changes=sharding.put(mesh, constants["changes"], specs["changes"]),
        mean=sharding.put(mesh, constants["mean"], specs["mean"]),
    )


def constant_specs(mesh: Mesh, channels: int) -> dict[str, PartitionSpec]:
    """Sharding of a layer's constants: rows are split over `channel` if it divides them."""
    divisible = channels % mesh.shape[sharding.CHANNEL_AXIS] == 0
    rows = PartitionSpec(None, sharding.CHANNEL_AXIS) if divisible else PartitionSpec()
    return {"changes": rows, "mean": PartitionSpec()}


def _shift(quantizer: Quantizer, path: str, fan_in: int) -> Float[Array, " k"]:
    """E[x] if biases are corrected, else zeros."""
    mean = quantizer.mean(path)
    return jnp.zeros(fan_in, jnp.float32) if mean is None else jnp.asarray(mean, jnp.float32)
