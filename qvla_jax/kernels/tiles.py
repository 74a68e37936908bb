"""Tiles: the arrangement of packed weights that the Pallas kernels read.

Output channels are along the lanes, as both accelerators prefer. Channels of one bit-width form
tiles of `lanes` channels, and a tile is a run of blocks of equal size, int32 [depth, lanes],
whatever its width: a block of b bits covers P depth inputs, P = 32 / b. It is split into planes,
each of which meets a contiguous slice of x. The words consist of U = 32 / unit units, and plane p
is the p-th field of every unit: in its unit v, word j of a column holds the code of input
start + (p depth + j) U + v. With whole words as units, unpacking is one shift to the left and one
arithmetic shift to the right; units of a byte are unpacked together and hold adjacent inputs.
16-bit codes are units of their own, or whole words have two.

A field holds the signed number s = u - 2^(b-1) for the stored code u: the code q itself where codes
are signed, and q = 2 s + 1 in tiles of odd 2-bit codes. 3-bit codes are held in 4 bits. Channels
that do not fill their last tile move to the next wider width, with their codes and scales, if that
takes fewer bytes than padding the tile; the product does not change. 8-bit channels do not move to
16 bits, where activations are not rounded.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import AnyArray, Int32
from qvla_jax.kernels.codes import WORD_BITS, array_module, held_bits, pack_words, unpack_words
from qvla_jax.kernels.packed import REARRANGED, PackedWeight, Rearranged, Segment, kept_of
from qvla_jax.quantization.codes import SIGNED, SOURCE, SOURCE_CODES, CodeMap

# Widths of tiles, in the order in which they follow one another.
TILE_BITS: Final = (16, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a canonical segment."""

    segment: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Their number."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Part:
    """Tiles of one bit-width: the chunks whose rows they hold, in order."""

    bits: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        """Rows without padding."""
        return sum(chunk.rows for chunk in self.chunks)

    def tiles(self, lanes: int) -> int:
        """Tiles that hold them."""
        return -(-self.rows // lanes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "bias", "index"],
    meta_fields=[*REARRANGED, "depth", "lanes", "unit"],
)
@dataclasses.dataclass(frozen=True)
class TiledWeight(Rearranged):
    """A packed weight in tiles; G blocks and T tiles in all."""

    words: AnyArray  # int32 [G, depth, lanes]
    scales: AnyArray  # bfloat16 [padded k / step, T lanes]; one row without groups
    bias: AnyArray  # float32 [c]; zeros if there is none
    index: AnyArray  # int32 [T lanes], output channel of a lane; -1: padding
    depth: int
    lanes: int
    # Bits of a unit of the words: 8 or 32.
    unit: int

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which rows are in tiles of which width."""
        return plan(self.segments, self.lanes)

    @property
    def padded_k(self) -> int:
        """Inputs covered by the blocks that reach furthest."""
        return padded_inputs(self.shape[1], self.parts, self.depth)

    @property
    def scale_step(self) -> int | None:
        """Inputs that a row of `scales` covers; None: all."""
        return None if self.group is None else scale_step(self.group, self.depth, self.unit)

    def code_map(self, bits: int) -> CodeMap:
        """What codes in tiles of a width stand for; rows that moved there have signed codes."""
        if bits == SOURCE:
            return SOURCE_CODES
        return next((s.code_map for s in self.segments if s.bits == bits), SIGNED[bits])


def plan(segments: tuple[Segment, ...], lanes: int) -> tuple[Part, ...]:
    """Tiles for the rows of all segments, moving rows to minimize bytes."""
    plans = (_moved(segments, lanes, moves) for moves in itertools.product((False, True), repeat=2))
    return min(plans, key=lambda parts: sum(p.bits * p.tiles(lanes) for p in parts))


def _moved(segments: tuple[Segment, ...], lanes: int, moves: tuple[bool, ...]) -> tuple[Part, ...]:
    held: dict[int, list[Chunk]] = {bits: [] for bits in TILE_BITS}
    for number, segment in enumerate(segments):
        held[held_bits(segment.bits)].append(Chunk(number, 0, segment.rows))
    for move, narrow, wide in zip(moves, (2, 4), (4, 8), strict=True):
        rest = sum(chunk.rows for chunk in held[narrow]) % lanes if move else 0
        while rest:
            last = held[narrow].pop()
            taken = min(rest, last.rows)
            if taken < last.rows:
                held[narrow].append(Chunk(last.segment, last.start, last.stop - taken))
            held[wide].append(Chunk(last.segment, last.stop - taken, last.stop))
            rest -= taken
    return tuple(Part(bits, tuple(held[bits])) for bits in TILE_BITS if held[bits])


def covered(bits: int, depth: int) -> int:
    """Inputs of a block."""
    return WORD_BITS // bits * depth


def padded_inputs(k: int, parts: tuple[Part, ...], depth: int) -> int:
    """The fan-in rounded up to whole blocks of every width present."""
    return max((-(-k // covered(p.bits, depth)) * covered(p.bits, depth) for p in parts), default=0)


def scale_step(group: int, depth: int, unit: int) -> int:
    """Inputs that share a row of scales: whole planes, or an equal part of each."""
    plane = WORD_BITS // unit * depth
    return group if group % plane == 0 else math.gcd(group, plane)


def blocks(w: TiledWeight) -> Iterator[tuple[int, int, int]]:
    """(bits, tile, first input) of every block, in order."""
    tile = 0
    for part in w.parts:
        step = covered(part.bits, w.depth)
        for _ in range(part.tiles(w.lanes)):
            for start in range(0, w.shape[1], step):
                yield part.bits, tile, start
            tile += 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiled", "position"],
    meta_fields=["implementation"],
)
@dataclasses.dataclass(frozen=True)
class PlacedWeight:
    """Tiles, and the lane of each output: what the kernels of GPUs take."""

    tiled: TiledWeight
    position: AnyArray  # int32 [c]; -1: pruned
    implementation: str  # see `dispatch.PreparedWeight`

    @property
    def shape(self) -> tuple[int, int]:
        """See `dispatch.PreparedWeight`."""
        return self.tiled.shape


def unsupported(w: PackedWeight) -> str | None:
    """Why tiles cannot hold a weight; None if they can."""
    if w.source_dtype != "bfloat16" and any(s.bits == SOURCE for s in w.segments):
        return f"rows of 16 bits must be bfloat16, not {w.source_dtype}"
    return None


def positions(w: TiledWeight, size: int) -> Int32[AnyArray, " n"]:
    """The lane of each of the first `size` outputs; -1 if it has none."""
    xp = array_module(w.index)
    lane = xp.arange(w.index.shape[0], dtype=np.int32)
    # Padding lanes write past the end, where nothing is read.
    target = xp.where(w.index < 0, size, w.index)
    found = xp.full(size + 1, -1, np.int32)
    if xp is jnp:
        return found.at[target].set(lane)[:size]
    found[target] = lane
    return found[:size]


def arrange(
    w: PackedWeight,
    depth: int,
    lanes: int,
    unit: int = WORD_BITS,
    blocked: Callable[..., AnyArray] | None = None,
) -> TiledWeight:
    """Canonical -> tiles; numpy arrays stay numpy arrays.

    Args:
        w: the weight.
        depth: words of a block.
        lanes: channels of a tile.
        unit: bits of a word that are unpacked together.
        blocked: another order of the words of blocks, such as `fragments.blocked`.
    """
    blocked = blocked or functools.partial(_blocked, unit=unit)
    xp, (c, k) = array_module(*jax.tree.leaves(w)), w.shape
    parts = plan(w.segments, lanes)
    channels = xp.arange(c) if w.index is None else xp.asarray(w.index)
    channels = channels.astype(np.int32)
    first = np.cumsum([0, *(segment.rows for segment in w.segments)])
    words, scales, index = [], [], []
    for part in parts:
        extra = -part.rows % lanes
        fields = [
            _fields(w, chunk, part.bits) for chunk in part.chunks
        ] + [xp.zeros((extra, k), np.uint16 if part.bits == SOURCE else np.uint8)]  # fmt: skip
        words.append(blocked(xp.concatenate(fields), part.bits, depth, lanes))
        own = [_scales(w, chunk) for chunk in part.chunks]
        own.append(xp.ones((extra, w.num_groups), ml_dtypes.bfloat16))
        scales.append(xp.concatenate(own))
        index += [
            channels[first[chunk.segment] + chunk.start : first[chunk.segment] + chunk.stop]
            for chunk in part.chunks
        ]
        index.append(xp.full(extra, -1, np.int32))
    joined = xp.concatenate([xp.ones((0, w.num_groups), ml_dtypes.bfloat16), *scales])
    if w.group is not None:
        step = scale_step(w.group, depth, unit)
        rows = -(-padded_inputs(k, parts, depth) // step)
        joined = xp.repeat(joined, w.group // step, axis=1)[:, :rows]
        joined = xp.pad(joined, ((0, 0), (0, rows - joined.shape[1])))
    bias = xp.zeros(c, np.float32) if w.bias is None else xp.asarray(w.bias).astype(np.float32)
    return TiledWeight(
        words=xp.concatenate([xp.zeros((0, depth, lanes), np.int32), *words]),
        scales=joined.T,
        bias=bias,
        index=xp.concatenate([xp.zeros(0, np.int32), *index]),
        **kept_of(w),
        depth=depth,
        lanes=lanes,
        unit=unit,
    )


def restore(w: TiledWeight, unblocked: Callable[..., AnyArray] | None = None) -> PackedWeight:
    """The inverse of `arrange`, exactly; `unblocked` is that of its `blocked`."""
    unblocked = unblocked or functools.partial(_unblocked, unit=w.unit)
    xp, k = array_module(*jax.tree.leaves(w)), w.shape[1]
    found: dict[Chunk, tuple[AnyArray, AnyArray, AnyArray]] = {}
    stride = 1 if w.group is None else w.group // scale_step(w.group, w.depth, w.unit)
    block = lane = 0
    for part in w.parts:
        tiles = part.tiles(w.lanes)
        count = tiles * -(-k // covered(part.bits, w.depth))
        fields = unblocked(w.words[block : block + count], part.bits, tiles)[:, :k]
        row = 0
        for chunk in part.chunks:
            here = slice(lane + row, lane + row + chunk.rows)
            own = fields[row : row + chunk.rows]
            source = w.segments[chunk.segment].bits == SOURCE
            found[chunk] = (
                _canonical_words(w, chunk, own, part.bits),
                w.scales[::stride, here][: 0 if source else w.num_groups].T,
                w.index[here],
            )
            row += chunk.rows
        block, lane = block + count, lane + tiles * w.lanes
    # Rows that moved are in wider tiles, before those that stayed.
    chunks = sorted(found, key=lambda chunk: (chunk.segment, chunk.start))
    of_segment = [[found[c] for c in chunks if c.segment == s] for s in range(len(w.segments))]
    index = [found[chunk][2] for chunk in chunks]
    channels = xp.concatenate([xp.zeros(0, np.int32), *index])
    return w.restored(
        words=(xp.concatenate([piece[0] for piece in pieces]) for pieces in of_segment),
        scales=(xp.concatenate([piece[1] for piece in pieces]) for pieces in of_segment),
        index=channels,
        bias=w.bias,
    )


def _fields(w: PackedWeight, chunk: Chunk, bits: int) -> AnyArray:
    """Bit fields of a chunk's rows in tiles of a width: unsigned [rows, k]."""
    segment = w.segments[chunk.segment]
    codes = unpack_words(w.words[chunk.segment][chunk.start : chunk.stop], segment.bits, w.shape[1])
    xp = array_module(codes)
    if segment.bits == SOURCE:
        return codes
    if segment.bits == bits:  # u -> s = u - 2^(b-1), for the odd map as well
        return codes ^ xp.uint8(2 ** (bits - 1))
    q = codes.astype(np.int32) * segment.code_map.multiplier + segment.code_map.offset
    return (q & (2**bits - 1)).astype(np.uint8)


def _canonical_words(w: TiledWeight, chunk: Chunk, fields: AnyArray, bits: int) -> AnyArray:
    """The inverse of `_fields`."""
    segment, xp = w.segments[chunk.segment], array_module(fields)
    if segment.bits == SOURCE:
        return pack_words(fields, SOURCE)
    if segment.bits == bits:
        return pack_words(fields ^ xp.uint8(2 ** (bits - 1)), bits)
    half = 2 ** (bits - 1)
    q = (fields ^ xp.uint8(half)).astype(np.int32) - half
    u = (q - segment.code_map.offset) // segment.code_map.multiplier
    return pack_words(u.astype(np.uint8), segment.bits)


def _scales(w: PackedWeight, chunk: Chunk) -> AnyArray:
    xp = array_module(w.words[chunk.segment])
    if w.segments[chunk.segment].bits == SOURCE:
        return xp.ones((chunk.rows, w.num_groups), ml_dtypes.bfloat16)
    return xp.asarray(w.scales[chunk.segment])[chunk.start : chunk.stop]


def _fields_of(bits: int, unit: int) -> list[tuple[int, int]]:
    """(plane, unit) of each bit field of a word, from the lowest on."""
    planes = max(unit // bits, 1)
    return [(i % planes, i // planes) for i in range(WORD_BITS // bits)]


def _blocked(
    fields: AnyArray, bits: int, depth: int, lanes: int, unit: int
) -> Int32[AnyArray, "g depth n"]:
    """Bit fields [T lanes, k] -> blocks, tile after tile."""
    xp, places = array_module(fields), _fields_of(bits, unit)
    planes, units = (max(place) + 1 for place in zip(*places, strict=True))
    rows, k = fields.shape
    fields = xp.pad(fields, ((0, 0), (0, -k % covered(bits, depth))))
    split = fields.reshape(rows // lanes, lanes, -1, planes, depth, units)
    words = xp.zeros((*split.shape[:3], depth), np.uint32)
    for i, (p, v) in enumerate(places):
        words = words | (split[:, :, :, p, :, v].astype(np.uint32) << xp.uint32(bits * i))
    words = words.transpose(0, 2, 3, 1).reshape(-1, depth, lanes)
    if xp is jnp:
        return jax.lax.bitcast_convert_type(words, jnp.int32)
    return np.ascontiguousarray(words).view(np.int32)


def _unblocked(words: AnyArray, bits: int, tiles: int, unit: int) -> AnyArray:
    """The inverse of `_blocked`: [T lanes, padded k]."""
    xp, places = array_module(words), _fields_of(bits, unit)
    words = words.view(np.uint32)
    depth, lanes = words.shape[1:]
    split = words.reshape(tiles, -1, depth, lanes).transpose(0, 3, 1, 2)
    kind = np.uint16 if bits == SOURCE else np.uint8
    fields = [
        ((split >> xp.uint32(bits * i)) & xp.uint32(2**bits - 1)).astype(kind)
        for i in range(WORD_BITS // bits)
    ]
    # [T, lanes, blocks, planes, depth, units]
    of_plane = [
        xp.stack([f for f, (q, _) in zip(fields, places, strict=True) if q == p], axis=-1)
        for p in range(max(places)[0] + 1)
    ]
    return xp.stack(of_plane, axis=3).reshape(tiles * lanes, -1)
