"""The TPU kernel: one Pallas launch for a weight of mixed bit-widths.

The grid walks over blocks of `kernels.tiles`, all of one size; tables prefetched into scalar memory
give the width, the tile and the first input of each block. Rows of x stay in VMEM with all their
inputs. The sums of a tile are finished with its last block: scaled, rounded to the type of x, and
stored, or held in the order of the lanes until the last step orders them.

bfloat16 activations are multiplied by the codes in bfloat16, which holds them exactly, and float32
activations in float32; if there are few rows, both are split into digits. Integer activations are
rounded when the launch starts, multiplied in int8, and summed in int32 unless there are groups.
Groups of a multiple of 128 inputs scale their own sums; others scale the weights, as the exact sum
of two bfloat16 numbers. `tpu_kernel` has the parts, `tpu_weight` the arrangement.

Without a TPU the kernel is interpreted, which is slow and only for tests.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qvla_jax.array_typing import AnyArray, Array, Float
from qvla_jax.kernels import tiles
from qvla_jax.kernels.activations import activation_scales, largest_code
from qvla_jax.kernels.batching import over_rows
from qvla_jax.kernels.tpu_kernel import (
    DIGITS,
    LANES,
    block_product,
    clear_beyond,
    joined,
    round_rows,
    split,
    store,
)
from qvla_jax.kernels.tpu_weight import (
    TpuWeight,
    canonical,
    lane_runs,
    prepare,
    step_tables,
    supports,
)
from qvla_jax.quantization.codes import SOURCE, CodeMap

__all__ = ["canonical", "matmul", "prepare", "supports"]

# VMEM that blocks may take, and that a launch may use with what the compiler adds; v5p has 64 MiB,
# v5e and v6e have 128.
_VMEM_BYTES: Final = 52 * 2**20
_VMEM_LIMIT: Final = 60 * 2**20
# Rows of a block of x: whole sublanes of int8, the narrowest type.
_ROWS: Final = 32
# Rows of a block that is split into digits.
_FEW: Final = (8, 16, 32)
# From here on sums of int8 products might not fit 32 bits.
_MOST_INPUTS: Final = 2**17
# Kinds of TPUs whose matrix unit multiplies no int8.
_WITHOUT_INT8: Final = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")
# How the kernel is interpreted; tests ask for more checks.
_INTERPRET: Any = True


def rows_per_block(m: int, w: TpuWeight, x_bytes: int, y_bytes: int) -> int:
    """Rows of x that a launch holds in VMEM at once: all, or as many as fit, evenly."""
    tiled = w.tiled
    # Inputs, the sums and outputs of a tile, and all outputs with and without their order.
    row = tiled.padded_k * x_bytes + 20 * tiled.lanes
    if not w.ordered:
        row += (tiled.index.shape[0] + w.position.shape[1]) * y_bytes
    # Words twice, planes unpacked to bytes and to the activations' type, and the scales.
    fixed = (8 + 48) * tiled.depth * tiled.lanes + 8 * tiled.scales.shape[0] * tiled.lanes
    fits = max((_VMEM_BYTES - fixed) // row // _ROWS * _ROWS, _ROWS)
    count = -(-m // fits)
    return -(-m // (count * _ROWS)) * _ROWS


def matmul(x: Float[Array, "*m k"], w: TpuWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """See `reference`; x is bfloat16 or float32.

    Of a few rows, which are split into digits, one that holds an infinity gives NaN in all channels
    of fewer than 16 bits, where the reference may give infinities. A row that holds NaN gives NaN
    in both.
    """
    run = functools.partial(_rows, activation_bits=activation_bits)
    return over_rows(run)(x, w)


def _rows(x: Float[Array, "m k"], w: TpuWeight, activation_bits: int) -> Float[Array, "m c"]:
    m, tiled = len(x), w.tiled
    if not tiled.segments or not m:
        return jnp.broadcast_to(jnp.asarray(tiled.bias)[None], (m, w.shape[0])).astype(x.dtype)
    integers = any(part.bits != SOURCE for part in tiled.parts)
    rounded = activation_bits != 16 and integers
    operands = {"float": x}
    if rounded:
        qmax = jnp.float32(largest_code(activation_bits))
        for name, factor in zip(("inverse", "scale"), activation_scales(x, qmax), strict=True):
            operands[name] = jnp.broadcast_to(factor, (m, LANES))
    elif activation_bits != 16:
        operands["float"] = x.astype(jnp.bfloat16)
    bm = next((rows for rows in _FEW if m <= rows), None)
    # Other groups need weights that are no integers.
    split = integers and not rounded and (tiled.scale_step or 0) % LANES == 0 and _has_int8()
    if not split or bm is None:
        x_bytes = operands["float"].dtype.itemsize + rounded
        bm, split = rows_per_block(m, w, x_bytes, x.dtype.itemsize), False
    if m < bm <= max(_FEW):
        # Whole vectors: the layout of a few rows is another, and the kernel slow with it.
        operands = {n: jnp.pad(v, ((0, bm - m), (0, 0))) for n, v in operands.items()}
    launch = functools.partial(
        _launch, bm=bm, split=split, largest=largest_code(activation_bits), dtype=x.dtype
    )
    y = jax.lax.platform_dependent(
        operands,
        w,
        tpu=functools.partial(launch, interpret=False),
        default=functools.partial(launch, interpret=_INTERPRET),
    )
    return y[:m]


def _has_int8() -> bool:
    """Whether the TPU multiplies int8; programs for one that is not here take it that it does."""
    return jax.default_backend() != "tpu" or jax.devices()[0].device_kind not in _WITHOUT_INT8


def _launch(
    x: dict[str, Array],
    w: TpuWeight,
    *,
    bm: int,
    split: bool,
    largest: int,
    dtype: Any,
    interpret: Any,
) -> Array:
    """One launch; x has "float", and "inverse" and "scale" if it is to be rounded.

    Blocks reach beyond the rows and inputs of x and beyond the outputs.
    """
    tiled = w.tiled
    rows, padded_k = x["float"].shape[0], tiled.padded_k
    lanes, groups = tiled.lanes, tiled.scales.shape[0]
    laid, widths = tiled.index.shape[0], {part.bits for part in tiled.parts}
    outputs, tables = laid if w.ordered else w.position.shape[1], step_tables(tiled)
    operands = x | {"words": tiled.words, "scales": tiled.scales, "bias": w.bias}
    # The index maps receive the grid's indices and the prefetched tables.
    # What is the same in all steps needs one buffer.
    once = {"pipeline_mode": pl.Buffered(1)}
    specs = {
        "float": pl.BlockSpec((bm, padded_k), lambda m, g, *_: (m, 0), **once),
        "inverse": pl.BlockSpec((bm, LANES), lambda m, g, *_: (m, 0), **once),
        "scale": pl.BlockSpec((bm, LANES), lambda m, g, *_: (m, 0), **once),
        "words": pl.BlockSpec((1, tiled.depth, lanes), lambda m, g, *_: (g, 0, 0)),
        "scales": pl.BlockSpec((groups, lanes), lambda m, g, kind, tile, *_: (0, tile[g])),
        "bias": pl.BlockSpec((1, lanes), lambda m, g, kind, tile, *_: (0, tile[g])),
    }
    scratch = {
        "sums": pltpu.VMEM(
            (bm * DIGITS if split else bm, lanes),
            jnp.int32 if (split or "scale" in x) and _sums_whole(tiled) else jnp.float32,
        ),
    }
    if tiled.group is not None:
        scratch["scales"] = pltpu.VMEM((groups, lanes), jnp.float32)
    if SOURCE in widths:
        scratch["exact"] = pltpu.VMEM((bm, lanes), jnp.float32)
    if "scale" in x:
        scratch["codes"] = pltpu.VMEM((bm, padded_k), jnp.int8)
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
            runs=tuple(map(len, lane_runs(tiled))),
            inputs=tiled.shape[1],
            largest=largest,
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
    return call(*tables.values(), w.starts, operands)


def _sums_whole(w: tiles.TiledWeight) -> bool:
    """Whether sums of int8 products stay integers until the end."""
    return w.group is None and w.padded_k < _MOST_INPUTS


def _cost(operands: Mapping[str, AnyArray], rows: int, passes: int, dtype: Any) -> pl.CostEstimate:
    words = operands["words"].nbytes * passes
    once = sum(value.nbytes for name, value in operands.items() if name != "words")
    lanes = operands["scales"].shape[1]
    inputs = operands["float"].shape[1]
    return pl.CostEstimate(
        flops=2 * rows * inputs * lanes,
        bytes_accessed=words + once + rows * lanes * np.dtype(dtype).itemsize,
        transcendentals=0,
    )


def _kernel(
    *arguments: Any,
    codes: Mapping[int, CodeMap],
    step: int | None,
    runs: tuple[int, ...],
    inputs: int,
    largest: int,
) -> None:
    """A step of the grid: one block of words for one block of rows.

    Args:
        arguments: the tables of steps, where segments start, and by name the operands; the output;
            and by name what is kept between steps.
        codes: of each width.
        step: inputs that share a scale, if groups have several.
        runs: number of runs of lanes that hold the outputs of each segment.
        inputs: of the weight.
        largest: code of an activation.
    """
    kind, tile, start, last, units, starts, refs, y, scratch = arguments
    g = pl.program_id(1)
    words, scales = refs["words"], scratch.get("scales")
    # What planes are multiplied by, and the scale of each row.
    x, scale = refs["float"], None
    if "digits" in scratch:
        x, scale = scratch["digits"], scratch["scale"]
    elif "codes" in scratch:
        x, scale = scratch["codes"], refs["scale"]

    @pl.when(g == 0)
    def _() -> None:
        clear_beyond(refs["float"], inputs)
        if "digits" in scratch:
            split(refs["float"], x, scale)
        elif "codes" in scratch:
            round_rows(refs["float"], refs["inverse"], x, largest)

    if scales is not None:

        @pl.when(start[g] == 0)
        def _() -> None:
            scales[...] = refs["scales"][...].astype(jnp.float32) * units[g]

    def add(width: int) -> None:
        source = width == SOURCE
        sums = scratch["exact" if source else "sums"]
        product = block_product(
            refs["float"] if source else x,
            words[0],
            start[g],
            bits=width,
            codes=codes[width],
            scales=scales,
            step=step,
            halved=source and "codes" in scratch,
        )
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
                store(
                    starts,
                    refs["position"],
                    refs["pruned"],
                    scratch["done"],
                    y,
                    runs=len(runs),
                    shared=sum(runs) - len(runs),
                )
