"""The TPU kernel: one Pallas launch for a weight of mixed bit-widths.

The grid walks over blocks of `kernels.tiles`, all of one size; tables prefetched into scalar memory
give the width, the tile and the first input of each block. Rows of x stay in VMEM with all their
inputs, and so do their sums, in the order of the tiles. The last step brings the sums into the
order of the outputs: within a segment channels ascend, so 128 adjacent outputs take at most 128
adjacent sums from each run of rows, which are in two vectors of lanes; a gather within those and a
selection place them. Pruned channels select nothing. Then the bias is added and the block of
outputs is stored.

bfloat16 activations are multiplied by the codes in bfloat16, which holds them exactly, and float32
activations in float32. Integer activations are multiplied in int8 and summed in int32 within a
block. Sums are scaled per block, or per plane if groups are whole planes; finer groups scale the
weights, as the exact sum of two bfloat16 numbers.

Without a TPU the kernel is interpreted, which is slow and only for tests.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qvla_jax.array_typing import AnyArray, Array, Float, Int32
from qvla_jax.kernels import planes, tiles
from qvla_jax.kernels.activations import quantize_activations
from qvla_jax.kernels.batching import over_rows
from qvla_jax.kernels.codes import WORD_BITS, array_module
from qvla_jax.kernels.packed import PackedWeight, Segment
from qvla_jax.quantization.codes import SOURCE, CodeMap

_LANES: Final = 128
# Candidates for the size of a block. 512 words by 512 channels are 1 MiB.
_DEPTHS: Final = (128, 256, 512)
_TILES: Final = (128, 256, 512)
# A step of the grid takes about 0.3 microseconds, in which memory delivers about this many bytes.
_STEP_BYTES: Final = 2**18
# VMEM that a launch may use; v5e, v5p and v6e have at least twice as much.
_VMEM_BYTES: Final = 40 * 2**20
# Rows of a block of x: whole sublanes of int8, the narrowest type.
_ROWS: Final = 32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tiled", "position", "windows"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TpuWeight:
    """Tiles, and the map from their lanes to the outputs; O vectors of 128 outputs, R runs."""

    tiled: tiles.TiledWeight
    position: AnyArray  # int32 [1, O 128], lane that an output's sum is in; -1: none
    windows: AnyArray  # int32 [O R], first vector of lanes in which a run serves an output vector

    @property
    def shape(self) -> tuple[int, int]:
        """See `dispatch.PreparedWeight`."""
        return self.tiled.shape

    @property
    def implementation(self) -> str:
        """See `dispatch.PreparedWeight`."""
        return "pallas_tpu"


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    return tiles.unsupported(w)


def prepare(w: PackedWeight) -> TpuWeight:
    """Arranges a weight in tiles; numpy arrays stay numpy arrays."""
    tiled = tiles.arrange(w, *block_shape(w.segments, w.shape[1], w.group))
    position = tiles.positions(tiled, -(-w.shape[0] // _LANES) * _LANES)
    windows = _windows(array_module(position), tiled, position)
    return TpuWeight(tiled, position[None], windows)


def _runs(w: tiles.TiledWeight) -> list[tuple[int, int]]:
    """Lanes [start, stop) of each chunk, within which outputs ascend."""
    runs, lane = [], 0
    for part in w.parts:
        start = lane
        for chunk in part.chunks:
            runs.append((start, start + chunk.rows))
            start += chunk.rows
        lane += part.tiles(w.lanes) * w.lanes
    return runs


def _windows(xp: Any, w: tiles.TiledWeight, position: AnyArray) -> Int32[AnyArray, " n"]:
    """First of the two vectors of lanes from which each run serves each vector of outputs."""
    by_vector = position.reshape(-1, _LANES)
    # A window is two vectors and must end within the scratch, which has one vector more.
    windows = []
    for start, stop in _runs(w):
        here = (by_vector >= start) & (by_vector < stop)
        first = xp.where(here, by_vector, np.int32(2**30)).min(axis=1)
        windows.append(xp.where(here.any(axis=1), first // _LANES, -1))
    if not windows:
        return xp.zeros(0, np.int32)
    return xp.stack(windows, axis=1).reshape(-1).astype(np.int32)


def canonical(w: TpuWeight) -> PackedWeight:
    """The inverse of `prepare`, exactly."""
    return tiles.restore(w.tiled)


def block_shape(segments: tuple[Segment, ...], k: int, group: int | None) -> tuple[int, int]:
    """Words and channels of a block: the fewest bytes to read, in steps that hide their overhead.

    Groups need planes of 128 inputs, so that a plane is within one group if groups are multiples of
    that.
    """
    depths = _DEPTHS if group is None else _DEPTHS[:1]

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        depth, lanes = shape
        steps = sum(
            part.tiles(lanes) * -(-k // tiles.covered(part.bits, depth))
            for part in tiles.plan(segments, lanes)
        )
        return steps * max(depth * lanes * 4, _STEP_BYTES), lanes

    return min(((d, n) for d in depths for n in _TILES), key=cost)


def rows_per_block(m: int, w: TpuWeight, x_bytes: int, y_bytes: int) -> int:
    """Rows of x that a launch holds in VMEM at once: all, or as many as fit, evenly."""
    tiled, c = w.tiled, w.position.shape[1]
    row = 2 * tiled.padded_k * x_bytes + 4 * (tiled.index.shape[0] + _LANES) + 2 * c * y_bytes
    # Words twice, one unpacked plane in int32 and in the activations' type, and the scales.
    fixed = 4 * 4 * tiled.depth * tiled.lanes + 8 * tiled.scales.shape[0] * tiled.lanes
    fits = max((_VMEM_BYTES - fixed) // (row + 8 * tiled.lanes) // _ROWS * _ROWS, _ROWS)
    count = -(-m // fits)
    return -(-m // (count * _ROWS)) * _ROWS


def matmul(x: Float[Array, "*m k"], w: TpuWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """See `reference`; x is bfloat16 or float32."""
    run = functools.partial(_rows, activation_bits=activation_bits)
    return over_rows(run)(x, w)


def _rows(x: Float[Array, "m k"], w: TpuWeight, activation_bits: int) -> Float[Array, "m c"]:
    (m, k), tiled = x.shape, w.tiled
    c = w.shape[0]
    if not tiled.segments or not m:
        return jnp.broadcast_to(jnp.asarray(tiled.bias)[None], (m, c)).astype(x.dtype)
    widths = {part.bits for part in tiled.parts}
    rounded = activation_bits != 16 and widths != {SOURCE}
    operands = {}
    if rounded:
        operands["codes"], operands["scale"] = quantize_activations(x, activation_bits)
    if not rounded or SOURCE in widths:
        operands["float"] = x if activation_bits == 16 else x.astype(jnp.bfloat16)
    bytes_per_input = sum(operands[n].dtype.itemsize for n in ("codes", "float") if n in operands)
    bm = rows_per_block(m, w, bytes_per_input, x.dtype.itemsize)
    padded = {
        name: jnp.pad(value, ((0, -m % bm), (0, tiled.padded_k - k if name != "scale" else 0)))
        for name, value in operands.items()
    }
    launch = functools.partial(_launch, bm=bm, dtype=x.dtype)
    y = jax.lax.platform_dependent(
        padded,
        w,
        tpu=functools.partial(launch, interpret=False),
        default=functools.partial(launch, interpret=True),
    )
    return y[:m, :c]


def _launch(x: dict[str, Array], w: TpuWeight, *, bm: int, dtype: Any, interpret: bool) -> Array:
    """One launch over padded rows; x has "float", or "codes" and "scale", or all three."""
    tiled = w.tiled
    rows, padded_k = x["codes" if "codes" in x else "float"].shape
    outputs, lanes, groups = w.position.shape[1], tiled.lanes, tiled.scales.shape[0]
    bits, tile, start = (np.asarray(v, np.int32) for v in zip(*tiles.blocks(tiled), strict=True))
    operands = x | {
        "words": tiled.words,
        "scales": tiled.scales,
        "position": w.position,
        "bias": jnp.pad(jnp.asarray(tiled.bias), (0, outputs - tiled.shape[0]))[None],
    }
    # The index maps receive the grid's indices and the prefetched tables.
    specs = {
        "float": pl.BlockSpec((bm, padded_k), lambda m, g, *_: (m, 0)),
        "codes": pl.BlockSpec((bm, padded_k), lambda m, g, *_: (m, 0)),
        "scale": pl.BlockSpec((bm, 1), lambda m, g, *_: (m, 0)),
        "words": pl.BlockSpec((1, tiled.depth, lanes), lambda m, g, *_: (g, 0, 0)),
        "scales": pl.BlockSpec((groups, lanes), lambda m, g, bits, tile, *_: (0, tile[g])),
        "position": pl.BlockSpec((1, outputs), lambda m, g, *_: (0, 0)),
        "bias": pl.BlockSpec((1, outputs), lambda m, g, *_: (0, 0)),
    }
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            codes={part.bits: tiled.code_map(part.bits) for part in tiled.parts},
            step=tiled.scale_step,
            blocks=len(bits),
            runs=len(_runs(tiled)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(rows // bm, len(bits)),
            in_specs=[{name: specs[name] for name in operands}],
            out_specs=pl.BlockSpec((bm, outputs), lambda m, g, *_: (m, 0)),
            scratch_shapes=[
                pltpu.VMEM((bm, tiled.index.shape[0] + _LANES), jnp.float32),
                pltpu.VMEM((groups, lanes), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES * 3 // 2
        ),
        cost_estimate=_cost(operands, rows, rows // bm, dtype),
        interpret=interpret,
        name="qvla_mixed_matmul",
    )
    return call(bits, tile, start, w.windows, operands)


def _cost(operands: dict[str, Array], rows: int, passes: int, dtype: Any) -> pl.CostEstimate:
    words = operands["words"].nbytes * passes
    once = sum(value.nbytes for name, value in operands.items() if name != "words")
    outputs, lanes = operands["bias"].shape[1], operands["scales"].shape[1]
    inputs = operands["codes" if "codes" in operands else "float"].shape[1]
    return pl.CostEstimate(
        flops=2 * rows * inputs * lanes,
        bytes_accessed=words + once + rows * outputs * np.dtype(dtype).itemsize,
        transcendentals=0,
    )


def _kernel(
    bits: Any,
    tile: Any,
    start: Any,
    windows: Any,
    refs: dict[str, Any],
    y: Any,
    *scratch: Any,
    codes: Mapping[int, CodeMap],
    step: int | None,
    blocks: int,
    runs: int,
) -> None:
    """A step of the grid: one block of words for one block of rows."""
    sums, scales = scratch
    g = pl.program_id(1)
    lanes = refs["words"].shape[2]
    here = pl.ds(pl.multiple_of(tile[g] * lanes, _LANES), lanes)

    @pl.when(start[g] == 0)
    def _() -> None:
        sums[:, here] = jnp.zeros((sums.shape[0], lanes), jnp.float32)
        # Rows of bfloat16 share sublanes, but single rows are read below.
        scales[...] = refs["scales"][...].astype(jnp.float32)

    for width in codes:

        @pl.when(bits[g] == width)
        def _(width: int = width) -> None:
            sums[:, here] += _block(refs, scales, start[g], width, codes[width], step)

    @pl.when(g == blocks - 1)
    def _() -> None:
        _store(windows, refs, y, sums, runs)


def _block(
    refs: dict[str, Any], scales: Any, start: Array, bits: int, codes: CodeMap, step: int | None
) -> Float[Array, "m n"]:
    """Scaled product of x with a block of words."""
    words = refs["words"][0]
    depth = words.shape[0]
    source = bits == SOURCE
    x = refs["float" if source or "codes" not in refs else "codes"]
    fine = step is not None and step < depth and not source
    total = None
    for plane in range(WORD_BITS // bits):
        first = pl.multiple_of(start + plane * depth, _LANES)
        xs = x[:, pl.ds(first, depth)]
        if source:
            part = planes.dot(xs, planes.unpack(words, bits, plane, codes))
        elif fine:
            assert step is not None
            above = jax.lax.div(first, step)
            own = [scales[pl.ds(above + g, 1), :] for g in range(depth // step)]
            part = _scaled_dot(xs, planes.unpack(words, bits, plane, codes), own)
        else:
            part = planes.dot(xs, planes.unpack(words, bits, plane, codes))
            if step is not None:
                part = part.astype(jnp.float32) * scales[pl.ds(jax.lax.div(first, step), 1), :]
        total = part if total is None else total + part
    assert total is not None
    total = total.astype(jnp.float32)
    if source:
        return total
    if step is None:
        total = total * scales[0:1, :]
    return total * refs["scale"][...] if "scale" in refs else total


def _scaled_dot(
    x: Array, codes: Int32[Array, "depth n"], scales: list[Float[Array, "1 n"]]
) -> Float[Array, "m n"]:
    """`x (s q)` with scales s of groups that are finer than a plane.

    `s q` has at most 16 bits: 8 of q, 8 of the bfloat16 s.
    """
    depth, lanes = codes.shape
    wide = [jnp.broadcast_to(row, (depth // len(scales), lanes)) for row in scales]
    w = codes.astype(jnp.float32) * jnp.concatenate(wide)
    if x.dtype == jnp.float32:
        return planes.dot(x, w)
    if x.dtype == jnp.int8:
        x = x.astype(jnp.float32).astype(jnp.bfloat16)
    upper = w.astype(jnp.bfloat16).astype(jnp.float32)
    return planes.dot(x, upper) + planes.dot(x, w - upper)


def _store(windows: Any, refs: dict[str, Any], y: Any, sums: Any, runs: int) -> None:
    """Sums in the order of the tiles -> outputs, 128 at a time."""
    rows = y.shape[0]

    @pl.loop(0, y.shape[1] // _LANES)
    def _(vector: Array) -> None:
        here = pl.ds(pl.multiple_of(vector * _LANES, _LANES), _LANES)
        wanted = jnp.broadcast_to(refs["position"][:, here], (rows, _LANES))
        y[:, here] = jnp.broadcast_to(refs["bias"][:, here], (rows, _LANES)).astype(y.dtype)
        for run in range(runs):
            window = windows[vector * runs + run]

            @pl.when(window >= 0)
            def _(window: Array = window) -> None:
                _merge(y, here, sums, window, wanted, refs["bias"])


def _merge(y: Any, here: Any, sums: Any, window: Array, wanted: Array, bias: Any) -> None:
    """Stores the wanted lanes that are in the two vectors of a window."""
    result = y[:, here]
    for half in range(2):
        first = pl.multiple_of((window + half) * _LANES, _LANES)
        lane = wanted - first
        inside = (lane >= 0) & (lane < _LANES)
        found = jnp.take_along_axis(
            sums[:, pl.ds(first, _LANES)], lane & (_LANES - 1), axis=1, mode="promise_in_bounds"
        )
        result = jnp.where(inside, (found + bias[:, here]).astype(y.dtype), result)
    y[:, here] = result
