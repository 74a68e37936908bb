"""A kernel for GPUs before Hopper and JAX before 0.11: Pallas through Triton.

Mosaic GPU, which `kernels.pallas_gpu` is written for, begins every kernel of JAX 0.10 with
instructions that only Hopper and later have (`elect.sync`, `fence.mbarrier_init`). JAX 0.11 has it
for Ampere as well, and deprecates Pallas's Triton backend, so that this module is never used there.

A weight takes one launch for each of its bit-widths.

A program holds some rows of x and one tile of `kernels.tiles` in registers and walks over the
tile's blocks of words; if there are few rows, several programs share the inputs of a tile. The rest
of the product is elementwise, and XLA fuses it: sums over the programs of a tile, scales, the
gather that brings sums into the order of the outputs, and the bias.

bfloat16 activations are multiplied by the codes in bfloat16, which holds them exactly, and float32
activations in float32. Integer activations are multiplied in int8 and summed in int32, within a
plane if weights have groups and within a program if they have none. Groups scale the sums of a
plane, which never spans two groups.

Without a GPU the kernel is interpreted, which is slow and only for tests.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels import planes, tiles
from qvla_jax.kernels.activations import quantize_activations
from qvla_jax.kernels.batching import over_rows
from qvla_jax.kernels.codes import WORD_BITS
from qvla_jax.kernels.packed import PackedWeight
from qvla_jax.kernels.tiles import PlacedWeight
from qvla_jax.quantization.codes import SOURCE, CodeMap

# Channels of a tile.
_LANES: Final = 64
# Words of a block: the shortest sum that the tensor cores take of int8 operands.
_DEPTH: Final = 32
# Maximum rows of x in a program, a multiple of the minimum for tensor cores.
_MOST_ROWS: Final = 64
_LEAST_ROWS: Final = 16
# Target number of programs: two for each of the 132 processors of an H100.
_PROGRAMS: Final = 264


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    if jax.__version_info__ >= (0, 11):
        return f"JAX {jax.__version__} deprecates Pallas's Triton backend; use 'pallas_gpu'"
    return tiles.unsupported(w)


def prepare(w: PackedWeight) -> PlacedWeight:
    """Arranges a weight in tiles; numpy arrays stay numpy arrays."""
    # Groups are multiples of 16, so a plane is within one group.
    depth = _DEPTH if w.group is None or w.group % _DEPTH == 0 else _DEPTH // 2
    tiled = tiles.arrange(w, depth, _LANES)
    return PlacedWeight(tiled, tiles.positions(tiled, w.shape[0]), "pallas_triton")


def canonical(w: PlacedWeight) -> PackedWeight:
    """The inverse of `prepare`, exactly."""
    return tiles.restore(w.tiled)


def matmul(x: Float[Array, "*m k"], w: PlacedWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """See `reference`; x is bfloat16 or float32."""
    run = functools.partial(_rows, activation_bits=activation_bits)
    return over_rows(run)(x, w)


def _rows(x: Float[Array, "m k"], w: PlacedWeight, activation_bits: int) -> Float[Array, "m c"]:
    (m, k), tiled = x.shape, w.tiled
    bias = jnp.asarray(tiled.bias)[None]
    if not tiled.segments or not m:
        return jnp.broadcast_to(bias, (m, w.shape[0])).astype(x.dtype)
    bm = min(-(-m // _LEAST_ROWS) * _LEAST_ROWS, _MOST_ROWS)
    padding = ((0, -m % bm), (0, tiled.padded_k - k))
    whole, rounded = x, None
    if activation_bits != 16:
        whole = x.astype(jnp.bfloat16)
        codes, scale = quantize_activations(x, activation_bits)
        # Sums too short for int8 tensor cores; bfloat16 also holds the codes.
        rounded = (codes if tiled.depth == _DEPTH else codes.astype(jnp.bfloat16), scale)
    sums, block, tile = [], 0, 0
    for part in tiled.parts:
        given, scale = (whole, None) if rounded is None or part.bits == SOURCE else rounded
        own = _part(jnp.pad(given, padding), tiled, part, (block, tile), bm)[:m]
        count = part.tiles(tiled.lanes)
        if tiled.group is None:
            lanes = slice(tile * tiled.lanes, (tile + count) * tiled.lanes)
            own = own * jnp.asarray(tiled.scales)[:1, lanes].astype(jnp.float32)
        sums.append(own if scale is None else own * scale)
        block += count * -(-k // tiles.covered(part.bits, tiled.depth))
        tile += count
    y = jnp.concatenate(sums, axis=1)
    position = jnp.asarray(w.position)
    y = jnp.where(position[None] < 0, 0.0, y[:, jnp.maximum(position, 0)])
    return (y + bias).astype(x.dtype)


def _part(
    x: Array, tiled: tiles.TiledWeight, part: tiles.Part, first: tuple[int, int], bm: int
) -> Float[Array, "m n"]:
    """Sums of the tiles of one width, starting at `first` (block, tile)."""
    launch = functools.partial(_launch, part=part, first=first, bm=bm)
    return jax.lax.platform_dependent(
        x,
        tiled,
        cuda=functools.partial(launch, interpret=False),
        default=functools.partial(launch, interpret=True),
    )


def _launch(
    x: Array,
    tiled: tiles.TiledWeight,
    *,
    part: tiles.Part,
    first: tuple[int, int],
    bm: int,
    interpret: bool,
) -> Float[Array, "m n"]:
    rows, padded_k = x.shape
    count, lanes = part.tiles(tiled.lanes), tiled.lanes
    blocks = -(-tiled.shape[1] // tiles.covered(part.bits, tiled.depth))
    # Programs that share a tile: as many as fill the device, each with a whole number of blocks.
    shares = min(max(_PROGRAMS // (rows // bm * count), 1), blocks)
    each = -(-blocks // shares)
    shares = -(-blocks // each)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            bits=part.bits,
            codes=tiled.code_map(part.bits),
            step=tiled.scale_step if part.bits != SOURCE else None,
            first=first,
            blocks=blocks,
            each=each,
        ),
        out_shape=jax.ShapeDtypeStruct((shares, rows, count * lanes), jnp.float32),
        grid=(rows // bm, count, shares),
        in_specs=[
            pl.BlockSpec((bm, padded_k), lambda m, t, s: (m, 0)),
            pl.BlockSpec(tiled.words.shape, lambda m, t, s: (0, 0, 0)),
            pl.BlockSpec(tiled.scales.shape, lambda m, t, s: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, bm, lanes), lambda m, t, s: (s, m, t)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name=f"qvla_matmul_{part.bits}",
    )
    return call(x, tiled.words, tiled.scales).sum(axis=0)


def _kernel(
    x: Any,
    words: Any,
    scales: Any,
    y: Any,
    *,
    bits: int,
    codes: CodeMap,
    step: int | None,
    first: tuple[int, int],
    blocks: int,
    each: int,
) -> None:
    """Rows of x times the inputs of one share of one tile."""
    tile, share = pl.program_id(1), pl.program_id(2)
    depth, lanes = words.shape[1:]
    first_block, first_tile = first
    here = pl.ds((first_tile + tile) * lanes, lanes)
    integers = x.dtype == jnp.int8
    # Sums of integers stay integers until a scale is applied.
    kind = jnp.int32 if integers and step is None else jnp.float32

    def add(block: Array, total: Array) -> Array:
        held = words[first_block + tile * blocks + block]
        for plane in range(WORD_BITS // bits):
            start = (block * (WORD_BITS // bits) + plane) * depth
            part = planes.dot(x[:, pl.ds(start, depth)], planes.unpack(held, bits, plane, codes))
            if step is not None:
                own = scales[jax.lax.div(start, step), here].astype(jnp.float32)
                part = part.astype(jnp.float32) * own[None]
            total = total + part
        return total

    stop = jnp.minimum((share + 1) * each, blocks)
    zeros = jnp.zeros(y.shape, kind)
    y[...] = jax.lax.fori_loop(share * each, stop, add, zeros).astype(jnp.float32)
