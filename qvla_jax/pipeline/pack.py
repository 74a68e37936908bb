"""`qvla pack`: packs a policy into one file, layer by layer, without calibration.

Weights may stay in the files of a public directory: a layer is read, rounded, packed and written
before the next one is read, so memory is bounded by the largest layer and not by the policy.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.packed_file import SUFFIX, write_packed
from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy
from qvla_jax.inference.loading import stays_in_files
from qvla_jax.inference.packing import pack_layer
from qvla_jax.inference.saving import packed_header
from qvla_jax.mapping import release_pages
from qvla_jax.models import named_modules
from qvla_jax.models.linear import Embed
from qvla_jax.pipeline.configs import PackConfig
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import ChannelIndex, option_sizes, quantizable_layers, quantize_rows
from qvla_jax.quantization.codes import GRID_BITS, PRUNED, SOURCE, Grid
from qvla_jax.quantization.grid import on_grid
from qvla_jax.quantization.layers import layer_info, weight_rows
from qvla_jax.quantization.quantizer import NEAREST_UNCORRECTED, UNIFORM_BASELINE
from qvla_jax.quantization.rows import QuantizedRows
from qvla_jax.solvers import AllocationProblem, solve

# Options of a mixed allocation.
_OPTIONS = (0, 2, 4, 8, 16)
# Rows rounded per call, so that all layers of a fan-in share one compiled program.
_ROWS = 1024
# Number of inputs of each row that its cost is estimated from.
_SAMPLED_INPUTS = 512


@in_32_bits
def pack(config: PackConfig, *, progress: Progress = no_progress) -> None:
    """Packs a policy and writes the file.

    Raises:
        InputError: the file's name does not end in .qvla, no allocation fits the budget, or the
            policy is quantized already.
        CheckpointError: a file of the policy is missing or broken.
    """
    if config.file.suffix != SUFFIX:
        raise InputError(f"{config.file}: a packed policy is one file; its name ends in {SUFFIX}")
    # Our own directories and presets are loaded: they are small, or were imported for loading.
    mapped = stays_in_files(config.model, progress=progress)
    policy = load_policy(config.model, mapped=mapped, progress=progress, **config.said())
    if policy.quantization is not None:
        raise InputError(f"{config.model}: is packed already; pack the full-precision policy")
    fingerprint = policy.fingerprint
    model = nnx.merge(*nnx.split(policy.model))  # separate modules, same arrays
    policy.family.drop_unread(model)
    layers = quantizable_layers(model, policy.layout.rules)
    index = ChannelIndex(tuple(layer_info(path, linear) for path, linear in layers.items()))
    mixed = config.mean_bits is not None
    quantizer = NEAREST_UNCORRECTED if mixed else UNIFORM_BASELINE
    if config.mean_bits is None:
        bits = np.full(len(index), config.bits)
    else:
        bits = weight_error_bits(layers, index, config.mean_bits, progress=progress)
    linears = named_modules(model, nnx.Linear)
    names = {f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")}
    tables: dict[str, Embed] = {}
    if config.embedding_bits != SOURCE:
        tables = named_modules(model, Embed)
        names |= {f"{path}.weight" for path in tables}
    tensors = {name: t for name, t in public_tensors(model).items() if name not in names}
    widths = {layer.path: bits[rows] for layer, rows in index.items()}
    write_packed(
        config.file,
        layers=itertools.chain(
            packed_layers(
                linears,
                widths,
                grid=quantizer.grid,
                index=mixed,
                kept_bits=config.kept_bits,
                inputs=kernels.LayerInputs(config.activation_bits),
                progress=progress,
            ),
            packed_tables(tables, config.embedding_bits),
        ),
        tensors=tensors,
        files=policy.processor.files(),
        header=packed_header(
            policy,
            {
                "quantizer": dataclasses.asdict(quantizer),
                "policy fingerprint": fingerprint,
                "calibration hash": None,
            },
            dropped=True,
        ),
    )


def packed_layers(
    linears: Mapping[str, nnx.Linear],
    widths: Mapping[str, Int[np.ndarray, " c"]],
    *,
    grid: Grid,
    index: bool,
    kept_bits: int,
    inputs: kernels.LayerInputs,
    progress: Progress = no_progress,
) -> Iterator[tuple[str, kernels.PackedWeight, kernels.LayerInputs]]:
    """Each linear layer, packed on request.

    Args:
        linears: all linear layers of the policy.
        widths: bits of each channel of those that are quantized.
        grid: the grid that rows are rounded to.
        index: whether quantized layers store the channel of each row.
        kept_bits: bits of the channels of all other layers, whose inputs are not rounded.
        inputs: what quantized layers do to their inputs.
        progress: reports progress.
    """
    for number, (path, linear) in enumerate(linears.items()):
        progress("pack", number, len(linears))
        rows, quantized = weight_rows(linear), path in widths
        bits = widths[path] if quantized else np.full(rows.shape[0], kept_bits)
        bias = None if linear.bias is None else linear.bias[...]
        packed = pack_layer(
            layer_info(path, linear),
            nearest_rows(rows, bits, grid),
            rows,
            bias,
            index=index and quantized,
        )
        yield path, packed, inputs if quantized else kernels.LayerInputs()
        release_pages(linear.kernel.get_value())
    progress("pack", len(linears), len(linears))


def packed_tables(
    embeds: Mapping[str, Embed], bits: int
) -> Iterator[tuple[str, kernels.PackedWeight, kernels.LayerInputs]]:
    """Each token embedding, packed on request with this many bits a row."""
    for path, embed in embeds.items():
        table = embed.embedding.get_value()
        packed = kernels.pack_table(np.asarray(table), bits)
        release_pages(table)  # a table is large: before what is packed is written
        yield path, packed, kernels.LayerInputs()


def nearest_rows(
    rows: Float[np.ndarray, "c k"], bits: Int[np.ndarray, " c"], grid: Grid
) -> QuantizedRows:
    """Rows rounded to nearest in blocks, so that layers of a fan-in share one compiled program."""
    codes = np.zeros(rows.shape, np.int8)
    scales = np.ones((rows.shape[0], 1), np.float32)
    for width in GRID_BITS:
        chosen = np.flatnonzero(bits == width)
        for start in range(0, len(chosen), _ROWS):
            block = chosen[start : start + _ROWS]
            # Padded with the first row.
            filled = np.pad(block, (0, _ROWS - len(block)), constant_values=block[0])
            q, s = jax.device_get(quantize_rows(rows[filled], width, grid=grid))
            codes[block], scales[block] = q[: len(block)], s[: len(block)]
    return QuantizedRows(bits=bits, codes=codes, scales=scales, grid=grid)


def weight_error_bits(
    linears: Mapping[str, nnx.Linear],
    index: ChannelIndex,
    mean_bits: float,
    *,
    progress: Progress = no_progress,
) -> Int[np.ndarray, " C"]:
    """Bits that minimize the squared weight error, relative to each layer's energy, in a budget.

    A stand-in for sensitivities, which need calibration data; it ignores the actions.

    Args:
        linears: the quantized layers.
        index: their channels.
        mean_bits: stored bits per weight, counting everything.
        progress: reports progress.

    Raises:
        BudgetError: even pruning everything takes more.
    """
    costs = np.empty((len(index), len(_OPTIONS)))
    for number, (layer, channels) in enumerate(index.items()):
        progress("weight errors", number, len(index.layers))
        rows = weight_rows(linears[layer.path])
        step = -(-layer.fan_in // _SAMPLED_INPUTS)
        errors = np.concatenate(
            [
                jax.device_get(_errors(_filled(rows[start : start + _ROWS, ::step])))
                for start in range(0, layer.out_features, _ROWS)
            ]
        )[: layer.out_features].astype(np.float64)
        costs[channels] = errors / max(errors[:, _OPTIONS.index(PRUNED)].sum(), 1e-30)
        release_pages(linears[layer.path].kernel.get_value())
    progress("weight errors", len(index.layers), len(index.layers))
    problem = AllocationProblem(
        costs=costs,
        sizes=option_sizes(index, _OPTIONS, bias_correction=False),
        budget=int(index.num_weights * mean_bits / 8),
    )
    return np.asarray(_OPTIONS)[solve(problem, "lagrangian").choice]


def _filled(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows.astype(np.float32), ((0, _ROWS - len(rows)), (0, 0)))


@jax.jit
def _errors(rows: Float[Array, "c k"]) -> Float[Array, "c n"]:
    """Squared error of each row under each option."""
    changes = (on_grid(rows, bits, grid="fitted") - rows for bits in _OPTIONS if bits != SOURCE)
    errors = [jnp.sum(jnp.square(change), axis=1) for change in changes]
    return jnp.stack([*errors, jnp.zeros(len(rows))], axis=1)
