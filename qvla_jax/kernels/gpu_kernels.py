"""The two launches of the kernel for NVIDIA GPUs, in Pallas for Mosaic GPU.

Both take all widths of a weight at once. A unit is a block of threads for a share of the inputs of
one tile of 128 channels, at some rows of x. Its two warpgroups have 64 channels each; they unpack
words in registers and multiply them from there, sums[channel, row] = W x^T. Units of wide tiles
come first, because the same inputs take them longer.

`direct` reads words and x from global memory to registers and multiplies with `mma`, which every
GPU from Ampere on has. With few rows there is nothing to gain by more: it waits for memory alone.
`streamed` has TMA bring words and x to shared memory, some steps ahead, and multiplies with
Hopper's `wgmma`, which takes x from there: while one warpgroup waits for the tensor cores, another
one unpacks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qvla_jax.array_typing import Array, Float, Int32
from qvla_jax.kernels import fragments, mosaic
from qvla_jax.quantization.codes import SOURCE, CodeMap

_WARPGROUPS: Final = fragments.LANES // fragments.ROWS
# Words of a block that a warpgroup has.
_DEPTH: Final = fragments.DEPTH // _WARPGROUPS
# Shared memory of a unit, so that two fit on a processor, and steps that are there at most.
_SHARED_BYTES: Final = 112 * 1024
_MOST_SLOTS: Final = 6


@dataclasses.dataclass(frozen=True)
class Work:
    """Tiles of one width."""

    bits: int
    codes: CodeMap
    tiles: int
    # Blocks of a tile, and of a unit.
    blocks: int
    each: int
    first_tile: int
    first_block: int
    # Which of the operands multiplies them.
    operand: int

    @property
    def shares(self) -> int:
        """Units of a tile."""
        return -(-self.blocks // self.each)

    @property
    def units(self) -> int:
        """Units of all tiles."""
        return self.tiles * self.shares


@dataclasses.dataclass(frozen=True)
class Launch:
    """What all units have in common."""

    works: tuple[Work, ...]
    # Rows of x of a unit.
    rows: int
    # Inputs that share a row of scales; None: scales are left to the caller.
    step: int | None
    # Whether constants come off the sums, not off the codes: less to do, but only for few rows.
    fast: bool


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a warpgroup works."""

    unit: Array
    half: Array
    rows: Array
    tile: Array
    # First block of the share within the tile, and blocks.
    start: Array
    blocks: Array


# Layers of one shape are traced and lowered once.
_once: Final = functools.partial(jax.jit, static_argnums=0, static_argnames="interpret")


@_once
def direct(
    launch: Launch,
    operands: Sequence[Int32[Array, "runs tiles lane word"]],
    words: Int32[Array, "g depth n"],
    scales: Float[Array, "s n"],
    *,
    interpret: bool,
) -> Float[Array, "units n m"]:
    """Sums of all units, with `mma` from global memory.

    Args:
        launch: the division of the work.
        operands: `fragments.columns` of rows of x, whole units of rows.
        words: blocks of `fragments.blocked`.
        scales: see `tiles.TiledWeight`.
        interpret: with twins of the instructions; see `kernels.mosaic`.
    """
    on: Any = mosaic.Twin if interpret else mosaic.Device
    columns = launch.rows // fragments.COLUMNS

    def unit(work: Work, place: _Place, words: Any, scales: Any, x: Any) -> Array:
        runs, code = fragments.runs(work.bits), _Unpacking(on, work, launch.fast)
        first = work.first_block + place.tile * work.blocks + place.start

        def block(number: Array, sums: Array) -> Array:
            start = (place.start + number) * runs
            held = words.at[first + number, place.half]
            rows = x.at[pl.ds(start, runs), pl.ds(place.rows * columns, columns)]
            for run in range(runs):
                matrix, above = code(held, run)
                for steps in _pieces(work, launch.step):
                    if launch.step is None or work.bits == SOURCE:
                        sums = on.mma(sums, matrix, rows, run, steps, above)
                        continue
                    part = on.mma(on.zeros(launch.rows), matrix, rows, run, steps, above)
                    row = (start + run) * fragments.RUN + steps.start * fragments.STEP
                    sums = sums + _scales(on, launch, work, place, scales, row) * part
            return sums

        return lax.fori_loop(0, place.blocks, block, on.zeros(launch.rows))

    rows = operands[0].shape[1] * fragments.COLUMNS
    kind = "plain" if interpret else "device"
    return _call(unit, launch, rows, kind, words, scales, operands)


@_once
def streamed(
    launch: Launch,
    operands: Sequence[Float[Array, "m k"]],
    words: Int32[Array, "g depth n"],
    scales: Float[Array, "s n"],
    *,
    interpret: bool,
) -> Float[Array, "units n m"]:
    """Sums of all units, with `wgmma` from shared memory.

    Args:
        launch: the division of the work; `step`, if there is one, is a multiple of a run.
        operands: bfloat16 rows of x, whole units of rows.
        words: blocks of `fragments.blocked`.
        scales: see `tiles.TiledWeight`.
        interpret: with twins of the instructions; see `kernels.mosaic`.
    """
    on: Any = mosaic.Twin if interpret else mosaic.Device

    def unit(work: Work, place: _Place, words: Any, scales: Any, x: Any) -> Array:
        code, runs = _Unpacking(on, work, fast=False), fragments.runs(work.bits)
        together, slots = _ring(work, launch)
        # Steps of the share, each of `together` runs, and of a block.
        own = runs // together
        steps = place.blocks * own
        first = work.first_block + place.tile * work.blocks + place.start

        def process(full: Any, free: Any, held: Any, rows: Any) -> Array:
            def fetch(step: Array, slot: Array) -> None:
                part = lax.rem(step, jnp.int32(own)) * (together * work.bits)
                plgpu.copy_gmem_to_smem(
                    words.at[
                        first + lax.div(step, jnp.int32(own)), :, pl.ds(part, together * work.bits)
                    ],
                    held.at[slot],
                    full.at[slot],
                )
                for run in range(together):
                    input_ = (place.start * runs + step * together + run) * fragments.RUN
                    plgpu.copy_gmem_to_smem(
                        x.at[
                            pl.ds(place.rows * launch.rows, launch.rows),
                            pl.ds(input_, fragments.RUN),
                        ],
                        rows.at[slot, run],
                        full.at[slot],
                    )

            for slot in range(slots):

                @pl.when((place.half == 0) & (slot < steps))
                def _(slot: int = slot) -> None:
                    fetch(jnp.int32(slot), jnp.int32(slot))

            def multiplied(step: Array, slot: Array, sums: Array) -> Array:
                words_of = held.at[slot, place.half]
                if launch.step is None or work.bits == SOURCE:
                    matrices = [code(words_of, run)[0] for run in range(together)]
                    return on.wgmma(sums, matrices, [rows.at[slot, run] for run in range(together)])
                for run in range(together):
                    matrix, _ = code(words_of, run)
                    part = on.wgmma(on.zeros(launch.rows), [matrix], [rows.at[slot, run]])
                    row = (place.start * runs + step * together + run) * fragments.RUN
                    sums = sums + _scales(on, launch, work, place, scales, row) * part
                return sums

            def body(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                sums, slot, before = carry
                plgpu.barrier_wait(full.at[slot])
                sums = multiplied(step, slot, sums)
                plgpu.barrier_arrive(free.at[slot])

                # The slot of the step before: the other warpgroup is done with it, or soon.
                @pl.when((place.half == 0) & (step >= 1) & (step - 1 + slots < steps))
                def _() -> None:
                    plgpu.barrier_wait(free.at[before])
                    fetch(step - 1 + slots, before)

                return sums, lax.select(slot == slots - 1, jnp.int32(0), slot + 1), slot

            start = on.zeros(launch.rows), jnp.int32(0), jnp.int32(0)
            sums = lax.fori_loop(0, steps, body, start)[0]
            # Whoever waits for a barrier must see all of its phases.
            for slot in range(slots):

                @pl.when((place.half == 0) & (slot < steps))
                def _(slot: int = slot) -> None:
                    plgpu.barrier_wait(free.at[slot])

            return sums

        return pl.run_scoped(
            process,
            plgpu.Barrier(num_arrivals=1 + together, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=slots),
            plgpu.SMEM((slots, _WARPGROUPS, together * work.bits, fragments.LANES), jnp.int32),
            plgpu.SMEM(
                (slots, together, launch.rows, fragments.RUN),
                jnp.bfloat16,
                transforms=mosaic.TRANSFORMS,
            ),
            collective_axes="warpgroup",
        )

    kind = "threads" if interpret else "device"
    return _call(unit, launch, operands[0].shape[0], kind, words, scales, operands)


def _ring(work: Work, launch: Launch) -> tuple[int, int]:
    """Runs of a step, and steps that shared memory holds."""
    size = launch.rows * fragments.RUN * 2 + _WARPGROUPS * work.bits * fragments.LANES * 4
    # Two, unless that leaves too few steps, or scales of each take too many registers.
    several = launch.step is None and fragments.runs(work.bits) > 1
    together = 2 if several and _SHARED_BYTES // (2 * size) >= 3 else 1
    return together, min(_SHARED_BYTES // (together * size), _MOST_SLOTS)


class _Unpacking:
    """Matrices of runs, from words."""

    def __init__(self, on: Any, work: Work, fast: bool) -> None:
        self._on, self._work = on, work
        self._fast = fast and work.bits in (2, 4)
        masks = fragments.masks(work.bits, work.codes)
        self._masks = {mask: on.constant(work.bits, mask) for mask in masks}

    def __call__(self, held: Any, run: int) -> tuple[Array, Float[np.ndarray, " run"] | None]:
        """The matrix of a run, and what it has too much."""
        bits, codes = self._work.bits, self._work.codes
        words = self._on.words(held, run, bits)
        found = fragments.pairs(words, bits, codes, self._masks)
        if not self._fast:
            return self._on.matrix(found, bits), None
        above = fragments.constants_of(found, bits)
        return self._on.matrix(found._replace(above=[None] * len(found.above)), bits), above


def _pieces(work: Work, step: int | None) -> Iterator[range]:
    """Steps of a run that share a row of scales."""
    size = fragments.RUN if step is None or work.bits == SOURCE else math.gcd(step, fragments.RUN)
    for start in range(0, fragments.RUN, size):
        yield range(start // fragments.STEP, (start + size) // fragments.STEP)


def _scales(
    on: Any, launch: Launch, work: Work, place: _Place, scales: Any, start: Array
) -> Float[Array, "rows n"]:
    """Scales of the inputs from `start` on, for a warpgroup's channels and every row of x."""
    lane = (work.first_tile + place.tile) * fragments.LANES + place.half * fragments.ROWS
    own = on.scales(scales.at[lax.div(start, jnp.int32(launch.step)), pl.ds(lane, fragments.ROWS)])
    return lax.broadcast_in_dim(own, (fragments.ROWS, launch.rows), (0,))


def _call(
    unit: Callable[..., Array],
    launch: Launch,
    rows: int,
    kind: Literal["device", "threads", "plain"],
    words: Array,
    scales: Array,
    operands: Sequence[Array],
) -> Float[Array, "units n m"]:
    """Launches `unit(work, place, words, scales, x)` for every unit.

    Kernels with barriers and copies are interpreted with threads, and others in XLA, which takes a
    fraction of the time.
    """
    names = ("unit", "rows", "warpgroup")
    starts = [int(n) for n in np.cumsum([0, *(work.units for work in launch.works)])]

    on: Any = mosaic.Device if kind == "device" else mosaic.Twin

    def kernel(words: Any, scales: Any, *rest: Any) -> None:
        *xs, y = rest
        number, row, half = (
            pl.program_id(axis) if kind == "plain" else lax.axis_index(name)
            for axis, name in enumerate(names)
        )
        for work, start, stop in zip(launch.works, starts, starts[1:], strict=False):

            @pl.when((number >= start) & (number < stop))
            def _(work: Work = work, start: int = start) -> None:
                tile = lax.div(number - start, jnp.int32(work.shares))
                first = lax.rem(number - start, jnp.int32(work.shares)) * work.each
                count = lax.min(jnp.int32(work.each), work.blocks - first)
                place = _Place(number, half, row, tile, first, count)
                sums = unit(work, place, words, scales, xs[work.operand])
                channels = pl.ds(half * fragments.ROWS, fragments.ROWS)
                on.store(sums, y.at[number, channels, pl.ds(row * launch.rows, launch.rows)])

    grid = (starts[-1], rows // launch.rows)
    out_type = jax.ShapeDtypeStruct((starts[-1], fragments.LANES, rows), jnp.float32)
    if kind == "plain":
        call = pl.pallas_call(kernel, out_type, grid=(*grid, _WARPGROUPS), interpret=True)
    else:
        call = plgpu.kernel(
            kernel,
            out_type=out_type,
            grid=grid,
            grid_names=names[:2],
            num_threads=_WARPGROUPS,
            thread_name=names[2],
            # No unit reads what it or another one writes.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            interpret=mosaic.interpretation() if kind == "threads" else None,
            kernel_name="qvla_matmul",
        )
    split = words.reshape(-1, _WARPGROUPS, _DEPTH, fragments.LANES)
    return call(split, scales, *operands)
