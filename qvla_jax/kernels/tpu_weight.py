"""Packed weights as the TPU kernel reads them: tiles, and the way from their lanes to the outputs.

Within a segment channels ascend, so 128 adjacent outputs take at most 128 adjacent lanes from each
run of its rows. Where output i is in lane i, outputs are stored as they come.
"""

import dataclasses
import functools
import itertools
from typing import Any, Final

import jax
import numpy as np
from jax.core import Tracer

from qvla_jax.array_typing import AnyArray, Int32
from qvla_jax.kernels import tiles
from qvla_jax.kernels.codes import array_module
from qvla_jax.kernels.packed import PackedWeight, Segment
from qvla_jax.kernels.tpu_kernel import LANES, UNIT, code_scale
from qvla_jax.quantization.codes import SOURCE

# Candidates for the size of a block.
_DEPTHS: Final = range(32, 1025, 32)
_TILES: Final = (128, 256, 512)
_BLOCK_BYTES: Final = 2**20
# The matrix unit of v6e multiplies by this many channels at once, and by fewer in the same time.
_LEAST_LANES: Final = 256
# A step of the grid takes about 150 cycles more than its product; memory delivers about this many
# bytes in them.
_STEP_BYTES: Final = 2**17


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiled", "bias", "position", "starts", "pruned"],
    meta_fields=["ordered"],
)
@dataclasses.dataclass(frozen=True)
class TpuWeight:
    """Tiles, and the map from their lanes to the outputs, O vectors of 128."""

    tiled: tiles.TiledWeight
    bias: AnyArray  # float32 [1, lanes of all tiles]
    position: AnyArray  # int32 [1, O 128], lane that an output's sum is in; -1: none
    starts: AnyArray  # int32, see `_starts`
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
        starts=_starts(xp, tiled, position),
        pruned=xp.pad(bias if vectors else bias[:0], (0, max(vectors * LANES - c, 0)))[None],
        ordered=ordered,
    )


def _is_ordered(w: PackedWeight, tiled: tiles.TiledWeight) -> bool:
    """Whether output i is in lane i; an index that is traced is not looked at."""
    if len(tiled.parts) != 1:
        return False
    if w.index is None:
        return True
    known = not isinstance(w.index, Tracer)
    return known and np.array_equal(np.asarray(w.index), np.arange(w.shape[0]))


def lane_runs(w: tiles.TiledWeight) -> list[list[tuple[int, int]]]:
    """Lanes [start, stop) of the rows of each segment, in which outputs ascend.

    Rows that moved to a wider width are the segment's last, and in lanes of their own.
    """
    found: list[dict[int, tuple[int, int]]] = [{} for _ in w.segments]
    lane = 0
    for part in w.parts:
        start = lane
        for chunk in part.chunks:
            found[chunk.segment][chunk.start] = (start, start + chunk.rows)
            start += chunk.rows
        lane += part.tiles(w.lanes) * w.lanes
    return [[own[first] for first in sorted(own)] for own in found]


def _starts(xp: Any, w: tiles.TiledWeight, position: AnyArray) -> Int32[AnyArray, " n"]:
    """Where the 128 lanes begin that each segment has for each vector of outputs.

    Behind these is, for all runs of a segment but its first, the vector that it shares with the run
    before it, and where its lanes for that begin. 0 stands for nothing, and does no harm.
    """
    by_vector = position.reshape(-1, LANES)
    if not w.parts or not len(by_vector):
        return xp.zeros(1, np.int32)  # scalar memory takes no empty arrays
    found, shared = [], []
    for own in lane_runs(w):
        starts, served = xp.zeros(len(by_vector), np.int32), xp.zeros(len(by_vector), bool)
        for number, (start, stop) in enumerate(own):
            here = (by_vector >= start) & (by_vector < stop)
            first = xp.where(here, by_vector, np.int32(2**30)).min(axis=1)
            here = here.any(axis=1)
            if number:
                both = served & here
                vector = xp.argmax(both)
                shared.append(xp.stack([vector, xp.where(both[vector], first[vector], 0)]))
            starts, served = xp.where(here & ~served, first, starts), served | here
        found.append(starts)
    return xp.concatenate([xp.stack(found, axis=1).reshape(-1), *shared]).astype(np.int32)


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
