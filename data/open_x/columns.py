"""Where numbers are in a step: a feature's path and a slice of its entries.

    "action[0:3]"                 the first three entries of the feature "action"
    "observation/state[-1:]"      the last one
    "action/world_vector"         all of them

The bounds are those of a Python slice, but must be inside the feature. In shapes, `t` counts the
steps of an episode and `d` columns.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import numpy as np

from qvla_jax.array_typing import Float64, NpArray
from qvla_jax.errors import DatasetError, InputError

# Columns side by side; None is one column of zeros.
Columns: TypeAlias = tuple[str | None, ...]
# The values of a feature, one for each step: a list, an array, or pictures that are not read yet.
Values: TypeAlias = Callable[[str], Any]

# Kinds of numpy dtypes that columns may have: booleans, integers, floats.
NUMBERS: Final = "biuf"
# Half of float32's range: differences of two values stay inside of it.
_LARGEST: Final = float(np.finfo(np.float32).max) / 2
# float32 holds every integer up to here.
_LARGEST_INTEGER: Final = 2**24

_PATTERN: Final = re.compile(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?")


@dataclass(frozen=True)
class Entries:
    """A feature and a slice of its entries; see the module's examples."""

    path: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the notation.

        Raises:
            InputError: it is not in this notation.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InputError(
                f"columns {text!r}: expected a path, or a path and a slice: state[0:6]"
            )
        path, start, stop = match.groups()
        return cls(path, None if start is None else int(start), None if stop is None else int(stop))

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return self.path
        start, stop = ("" if bound is None else bound for bound in (self.start, self.stop))
        return f"{self.path}[{start}:{stop}]"

    def width(self, size: int) -> int:
        """Number of entries taken from a feature of `size`.

        Raises:
            DatasetError: a bound is outside the feature, or nothing is between them.
        """
        taken = len(range(size)[self.start : self.stop])
        outside = [b for b in (self.start, self.stop) if b is not None and not -size <= b <= size]
        if outside or not taken:
            raise DatasetError(f"{self}: {self.path} has only {size} entries")
        return taken

    def of(self, values: Sequence[Any], first_step: int = 0) -> Float64[NpArray, "t d"]:
        """The entries of every step; scalars are features with one entry.

        Raises:
            DatasetError: a value is not a number, not finite, or does not fit in float32; the
                message names the step, counted from `first_step` on.
        """
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise DatasetError(f"{self}: steps differ in shape") from error
        if array.dtype.kind not in NUMBERS or array.ndim > 2:
            raise DatasetError(
                f"{self}: expected a vector of numbers in each step, found {array.dtype} "
                f"{list(array.shape[1:])}"
            )
        array = array.reshape(len(values), -1)
        size = array.shape[1]
        self.width(size)
        array = array[:, self.start : self.stop]
        exact = array.dtype.kind in "iu"
        # Written so that NaN also fails.
        fits = np.abs(array.astype(np.float64)) <= (_LARGEST_INTEGER if exact else _LARGEST)
        if not fits.all():
            step, place = np.argwhere(~fits)[0].tolist()
            value = array[step, place]
            entry = range(size)[self.start : self.stop][place]
            what = "not finite" if not np.isfinite(value) else "more than float32 can hold"
            raise DatasetError(
                f"step {step + first_step}: {self.path}: entry {entry} is {value}, which is "
                f"{what}; mend the data set, or build it without this episode"
            )
        return array.astype(np.float64)


def paths(columns: Columns) -> list[str]:
    """The features that columns are taken from."""
    return [Entries.parse(text).path for text in columns if text is not None]


def width(columns: Columns, sizes: Mapping[str, int]) -> int:
    """Number of columns, given how many entries each feature has."""
    entries = [None if text is None else Entries.parse(text) for text in columns]
    return sum(1 if one is None else one.width(sizes[one.path]) for one in entries)


def numbers(columns: Columns, values: Values, steps: range) -> Float64[NpArray, "t d"]:
    """The columns, side by side, for some of a record's steps.

    Raises:
        DatasetError: a value of these steps is not finite; see `Entries.of`.
    """
    parts = [np.zeros((len(steps), 0))]
    for text in columns:
        if text is None:
            parts.append(np.zeros((len(steps), 1)))
        else:
            entries = Entries.parse(text)
            parts.append(entries.of(values(entries.path)[steps.start : steps.stop], steps.start))
    return np.concatenate(parts, axis=1)
