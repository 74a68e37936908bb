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
import itertools
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qvla_jax.array_typing import AnyArray, Array, Float, Int32
from qvla_jax.kernels import tiles
from qvla_jax.kernels.activations import quantize_activations
from qvla_jax.kernels.batching import over_rows
from qvla_jax.kernels.codes import array_module
from qvla_jax.kernels.packed import PackedWeight, Segment
from qvla_jax.kernels.tpu_kernel import (
    DIGITS,
    LANES,
    UNIT,
    block_product,
    clear_beyond,
    code_scale,
    joined,
    split,
    store,
)
from qvla_jax.quantization.codes import SOURCE, CodeMap

# Candidates for the size of a block.
_DEPTHS: Final = range(32, 1025, 32)
_TILES: Final = (128, 256, 512)
_BLOCK_BYTES: Final = 2**20
# The matrix unit of v6e multiplies by this many channels at once, and by fewer in the same time.
_LEAST_LANES: Final = 256
# A step of the grid takes about 150 cycles more than its product; memory delivers about this many
# bytes in them.
_STEP_BYTES: Final = 2**17
# VMEM that blocks may take, and that a launch may use with what the compiler adds; v5p has 64 MiB,
# v5e and v6e have 128.
_VMEM_BYTES: Final = 52 * 2**20
_VMEM_LIMIT: Final = 60 * 2**20
# Rows of a block of x: whole sublanes of int8, the narrowest type.
_ROWS: Final = 32
# Rows of x that are split into digits.
_FEW: Final = (8, 16, 32)
# From here on sums of int8 products might not fit 32 bits.
_MOST_INPUTS: Final = 2**17


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiled", "bias", "position", "windows", "pruned"],
    meta_fields=["ordered"],
)
@dataclasses.dataclass(frozen=True)
class TpuWeight:
    """Tiles, and the map from their lanes to the outputs; O vectors of 128 outputs, R runs."""

    tiled: tiles.TiledWeight
    bias: AnyArray  # float32 [1, lanes of all tiles]
    position: AnyArray  # int32 [1, O 128], lane that an output's sum is in; -1: none
    windows: AnyArray  # int32 [O R], first vector of lanes in which a run serves an output vector
    pruned: AnyArray  # float32 [1, O 128], outputs that are in no lane
    # Whether output i is in lane i; then there are no such arrays (O = 0).
    ordered: bool

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
    tiled = tiles.arrange(w, *block_shape(w.segments, w.shape[1]), UNIT)
    xp, c = array_module(tiled.index), w.shape[0]
    ordered = _is_ordered(w, tiled)
    vectors = 0 if ordered else -(-c // LANES)
    position = tiles.positions(tiled, vectors * LANES) if vectors else xp.zeros(0, np.int32)
    bias = xp.asarray(tiled.bias)
    return TpuWeight(
        tiled=tiled,
        bias=xp.where(tiled.index < 0, np.float32(0), bias[xp.maximum(tiled.index, 0)])[None],
        position=position[None],
        windows=_windows(xp, tiled, position),
        pruned=xp.pad(bias, (0, vectors * LANES - c))[None] if vectors else xp.zeros((1, 0), np.float32),
        ordered=ordered,
    )


def _is_ordered(w: PackedWeight, tiled: tiles.TiledWeight) -> bool:
    """Whether output i is in lane i; an index that is traced is not looked at."""
    if len(tiled.parts) != 1:
        return False
    if w.index is None:
        return True
    known = not isinstance(w.index, jax.core.Tracer)
    return known and np.array_equal(np.asarray(w.index), np.arange(w.shape[0]))


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
    """First of the two vectors of lanes from which each run serves each vector of outputs.

    Any, where it serves none.
    """
    by_vector = position.reshape(-1, LANES)
    # A window is two vectors and must end within the scratch, which has one vector more.
    windows = []
    for start, stop in _runs(w):
        here = (by_vector >= start) & (by_vector < stop)
        first = xp.where(here, by_vector, np.int32(2**30)).min(axis=1)
        windows.append(xp.where(here.any(axis=1), first, 0))
    if not windows or not len(by_vector):
        return xp.zeros(1, np.int32)  # scalar memory takes no empty arrays
    return xp.stack(windows, axis=1).reshape(-1).astype(np.int32)


def canonical(w: TpuWeight) -> PackedWeight:
    """The inverse of `prepare`, exactly."""
    return tiles.restore(w.tiled)


def block_shape(segments: tuple[Segment, ...], k: int) -> tuple[int, int]:
    """Words and channels of a block: what reads, waits and multiplies least.

    A product reads all blocks, waits for the first, takes some time for each step, and multiplies
    what blocks cover, padding included. All of it is counted in bytes that memory delivers
    meanwhile; a multiplication counts as one, as with half of 600 rows.
    """

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        depth, lanes = shape
        wide = max(lanes, _LEAST_LANES)
        size, total = 4 * depth * wide, 0
        for part in tiles.plan(segments, lanes):
            inputs = tiles.covered(part.bits, depth)
            total += part.tiles(lanes) * -(-k // inputs) * (size + _STEP_BYTES + inputs * wide)
        return total + size, lanes

    # Slices of x begin at whole vectors: planes have 4 or, at 16 bits, 2 inputs a word.
    whole = LANES // 2 if any(s.bits == SOURCE for s in segments) else LANES // 4
    shapes = itertools.product(_DEPTHS, _TILES)
    fitting = (s for s in shapes if s[0] % whole == 0 and 4 * s[0] * s[1] <= _BLOCK_BYTES)
    return min(fitting, key=cost)


def few(m: int) -> int | None:
    """Rows of a launch that splits them into digits; None if there are too many."""
    return next((rows for rows in _FEW if m <= rows), None)


def rows_per_block(m: int, w: TpuWeight, x_bytes: int, y_bytes: int) -> int:
    """Rows of x that a launch holds in VMEM at once: all, or as many as fit, evenly."""
    tiled, c = w.tiled, w.position.shape[1]
    # Inputs, outputs with and without their order, and the sums of a tile.
    row = tiled.padded_k * x_bytes + (tiled.index.shape[0] + c) * y_bytes + 12 * tiled.lanes
    # Words twice, planes unpacked to bytes and to the activations' type, and the scales.
    fixed = (8 + 48) * tiled.depth * tiled.lanes + 8 * tiled.scales.shape[0] * tiled.lanes
    fits = max((_VMEM_BYTES - fixed) // row // _ROWS * _ROWS, _ROWS)
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
        operands["scale"] = jnp.broadcast_to(operands["scale"], (m, LANES))
    if not rounded or SOURCE in widths:
        operands["float"] = x if activation_bits == 16 else x.astype(jnp.bfloat16)
    bytes_per_input = sum(operands[n].dtype.itemsize for n in ("codes", "float") if n in operands)
    step = tiled.scale_step
    split = not rounded and widths != {SOURCE} and (step is None or step % LANES == 0)
    bm = few(m) if split else None
    split = bm is not None
    if bm is None:
        bm = rows_per_block(m, w, bytes_per_input, x.dtype.itemsize)
    if split:  # whole blocks of few rows
        operands["float"] = jnp.pad(operands["float"], ((0, bm - m), (0, tiled.padded_k - k)))
    launch = functools.partial(_launch, bm=bm, split=split, dtype=x.dtype)
    y = jax.lax.platform_dependent(
        operands,
        w,
        tpu=functools.partial(launch, interpret=False),
        default=functools.partial(launch, interpret=True),
    )
    return y[:m]


def _launch(
    x: dict[str, Array], w: TpuWeight, *, bm: int, split: bool, dtype: Any, interpret: Any
) -> Array:
    """One launch; x has "float", or "codes" and "scale", or all three.

    Blocks reach beyond the rows and inputs of x and beyond the outputs.
    """
    tiled = w.tiled
    rows, padded_k = x["codes" if "codes" in x else "float"].shape[0], tiled.padded_k
    lanes, groups = tiled.lanes, tiled.scales.shape[0]
    laid, widths = tiled.index.shape[0], {part.bits for part in tiled.parts}
    outputs, tables = laid if w.ordered else w.position.shape[1], step_tables(tiled)
    operands = x | {"words": tiled.words, "scales": tiled.scales, "bias": w.bias}
    # The index maps receive the grid's indices and the prefetched tables.
    # What is the same in all steps needs one buffer.
    once = {"pipeline_mode": pl.Buffered(1)}
    specs = {
        "float": pl.BlockSpec((bm, padded_k), lambda m, g, *_: (m, 0), **once),
        "codes": pl.BlockSpec((bm, padded_k), lambda m, g, *_: (m, 0), **once),
        "scale": pl.BlockSpec((bm, LANES), lambda m, g, *_: (m, 0), **once),
        "words": pl.BlockSpec((1, tiled.depth, lanes), lambda m, g, *_: (g, 0, 0)),
        "scales": pl.BlockSpec((groups, lanes), lambda m, g, kind, tile, *_: (0, tile[g])),
        "bias": pl.BlockSpec((1, lanes), lambda m, g, kind, tile, *_: (0, tile[g])),
    }
    scratch = {
        "sums": pltpu.VMEM(
            (bm * DIGITS if split else bm, lanes),
            jnp.int32 if (split or "codes" in x) and _sums_whole(tiled) else jnp.float32,
        ),
    }
    if tiled.group is not None:
        scratch["scales"] = pltpu.VMEM((groups, lanes), jnp.float32)
    if SOURCE in widths:
        scratch["exact"] = pltpu.VMEM((bm, lanes), jnp.float32)
    if split:
        scratch["digits"] = pltpu.VMEM((bm * DIGITS, padded_k), jnp.int8)
        scratch["scale"] = pltpu.VMEM((bm, LANES), jnp.float32)
    out = pl.BlockSpec((bm, lanes), lambda m, g, kind, tile, *_: (m, tile[g]))
    if not w.ordered:
        operands |= {"position": w.position, "pruned": w.pruned}
        specs["position"] = pl.BlockSpec((1, outputs), lambda m, g, *_: (0, 0))
        specs["pruned"] = pl.BlockSpec((1, outputs), lambda m, g, *_: (0, 0))
        size = np.dtype(dtype).itemsize
        scratch["done"] = pltpu.VMEM((bm * size // 4, laid + LANES), jnp.int32)
        out = pl.BlockSpec((bm, outputs), lambda m, g, *_: (m, 0), **once)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            codes={part.bits: tiled.code_map(part.bits) for part in tiled.parts},
            step=tiled.scale_step,
            runs=len(_runs(tiled)),
            inputs=tiled.shape[1],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, w.shape[0]), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables) + 1,
            grid=(-(-rows // bm), len(tables["tile"])),
            in_specs=[{name: specs[name] for name in operands}],
            out_specs=out,
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(operands, rows, -(-rows // bm), dtype),
        interpret=interpret,
        name="qvla_mixed_matmul",
    )
    return call(*tables.values(), w.windows, operands)


def step_tables(w: tiles.TiledWeight) -> dict[str, np.ndarray]:
    """What steps of the grid look up: one entry for each block."""
    bits, tile, start = (np.asarray(v, np.int32) for v in zip(*tiles.blocks(w), strict=True))
    widths = [part.bits for part in w.parts]
    scale = {width: code_scale(width, w.code_map(width)) for width in widths}
    return {
        "kind": np.array([widths.index(b) for b in bits], np.int32),
        "tile": tile,
        "start": start,
        "last": np.append(start[1:] == 0, True).astype(np.int32),
        "units": np.array([scale[b] for b in bits], np.float32),
    }


def _sums_whole(w: tiles.TiledWeight) -> bool:
    """Whether sums of int8 products stay integers until the end."""
    return w.group is None and w.padded_k < _MOST_INPUTS


def _cost(operands: dict[str, Array], rows: int, passes: int, dtype: Any) -> pl.CostEstimate:
    words = operands["words"].nbytes * passes
    once = sum(value.nbytes for name, value in operands.items() if name != "words")
    lanes = operands["scales"].shape[1]
    inputs = operands["codes" if "codes" in operands else "float"].shape[1]
    return pl.CostEstimate(
        flops=2 * rows * inputs * lanes,
        bytes_accessed=words + once + rows * lanes * np.dtype(dtype).itemsize,
        transcendentals=0,
    )


def _kernel(
    kind: Any,
    tile: Any,
    start: Any,
    last: Any,
    units: Any,
    windows: Any,
    refs: dict[str, Any],
    y: Any,
    scratch: dict[str, Any],
    *,
    codes: Mapping[int, CodeMap],
    step: int | None,
    runs: int,
    inputs: int,
) -> None:
    """A step of the grid: one block of words for one block of rows."""
    g = pl.program_id(1)
    words, scales = refs["words"], scratch.get("scales")
    x, scale = refs.get("codes", refs.get("float")), refs.get("scale")

    @pl.when(g == 0)
    def _() -> None:
        for name in ("float", "codes"):
            if name in refs:
                clear_beyond(refs[name], inputs)
        if "digits" in scratch:
            split(refs["float"], scratch["digits"], scratch["scale"])

    if "digits" in scratch:
        x, scale = scratch["digits"], scratch["scale"]

    if scales is not None:

        @pl.when(start[g] == 0)
        def _() -> None:
            scales[...] = refs["scales"][...].astype(jnp.float32) * units[g]

    def add(width: int) -> None:
        sums, given = scratch["sums"], x
        if width == SOURCE:
            sums, given = scratch["exact"], refs["float"]
        assert given is not None
        product = block_product(given, words[0], start[g], width, codes[width], scales, step)
        before = jnp.where(start[g] == 0, jnp.zeros((), sums.dtype), sums[...])
        sums[...] = before + product.astype(sums.dtype)

    if len(codes) == 1:
        add(*codes)
    else:
        jax.lax.switch(kind[g], [functools.partial(add, width) for width in codes])

    @pl.when(last[g] == 1)
    def _() -> None:
        lanes = words.shape[2]
        here = pl.ds(pl.multiple_of(tile[g] * lanes, LANES), lanes)

        def finish(total: Array, factor: Any) -> None:
            if factor is not None:
                total = total * factor
            total = (total + refs["bias"][...]).astype(y.dtype)
            if "done" in scratch:
                scratch["done"][:, here] = pltpu.bitcast(total, jnp.int32)
            else:
                y[...] = total

        def sums_of_codes() -> None:
            sums = scratch["sums"]
            total = joined(sums) if "digits" in scratch else sums[...].astype(jnp.float32)
            if scales is None:
                total = total * (refs["scales"][...].astype(jnp.float32) * units[g])
            finish(total, None if scale is None else scale[:, :1])

        if "exact" not in scratch:
            sums_of_codes()
        elif len(codes) == 1:
            finish(scratch["exact"][...], None)
        else:
            # 16-bit tiles are the first.
            source = kind[g] == 0
            pl.when(source)(lambda: finish(scratch["exact"][...], None))
            pl.when(jnp.logical_not(source))(sums_of_codes)
        if "done" in scratch:

            @pl.when(g == pl.num_programs(1) - 1)
            def _() -> None:
                store(windows, refs["position"], refs["pruned"], scratch["done"], y, runs)
