"""Code sets: the integers that a row may have at each bit-width of each grid.

Grids, storage and kernels all read this one table.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from qvla_jax.errors import InputError

Grid: TypeAlias = Literal["fitted", "rtn"]

PRUNED: Final = 0
SOURCE: Final = 16
# Allocations use 3 bits only on request.
GRID_BITS: Final = (2, 3, 4, 8)
BITS: Final = (PRUNED, *GRID_BITS, SOURCE)


class CodeMap(NamedTuple):
    """What an unsigned stored code u in [0, 2^b) stands for: q = multiplier u + offset."""

    multiplier: int
    offset: int

    def highest(self, bits: int) -> int:
        """The largest q at this many bits."""
        return self.offset + self.multiplier * (2**bits - 1)


# -2^(b-1), ..., 2^(b-1) - 1. Every integer of a narrower width is among those of a wider one.
SIGNED: Final[Mapping[int, CodeMap]] = {bits: CodeMap(1, -(2 ** (bits - 1))) for bits in GRID_BITS}
CODE_MAPS: Final[Mapping[Grid, Mapping[int, CodeMap]]] = {
    "rtn": SIGNED,
    # {-3, -1, 1, 3}: see `quantization.grid`.
    "fitted": {**SIGNED, 2: CodeMap(2, -3)},
}
GRIDS: Final[tuple[Grid, ...]] = get_args(Grid)
# 16-bit rows store the source's own numbers.
SOURCE_CODES: Final = CodeMap(1, 0)


def code_map(bits: int, grid: Grid) -> CodeMap:
    """The integers of a grid at a bit-width.

    Raises:
        InputError: there is no such grid, or it has no such width.
    """
    if grid not in CODE_MAPS:
        raise InputError(f"unknown grid {grid!r}; choose {' or '.join(map(repr, GRIDS))}")
    if bits not in CODE_MAPS[grid]:
        raise InputError(f"no grid has {bits} bits; choose from {GRID_BITS}")
    return CODE_MAPS[grid][bits]


def maps_of(bits: int) -> tuple[CodeMap, ...]:
    """What stored codes of a width may stand for, over all grids."""
    if bits == SOURCE:
        return (SOURCE_CODES,)
    return tuple(dict.fromkeys(maps[bits] for maps in CODE_MAPS.values()))


def levels(bits: int, grid: Grid) -> tuple[int, int, int, int]:
    """A grid's codes as (lowest, highest, step, offset): offset + step i, within the bounds.

    The offset is the code of least magnitude that is not negative.

    Raises:
        InputError: as `code_map`.
    """
    codes = code_map(bits, grid)
    return codes.offset, codes.highest(bits), codes.multiplier, codes.offset % codes.multiplier
