"""Rows of a LeRobot data set: numbers, and pictures that lie among them.

Only the row groups that hold an episode are read, and of these only the columns asked for.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
from etils import epath

from qvla_jax.array_typing import NpArray
from qvla_jax.data.lerobot.parquet import check_columns, opened
from qvla_jax.data.open_x.features import Feature
from qvla_jax.data.pictures import LazyPictures
from qvla_jax.errors import DatasetError

# The kinds of numbers that may be stored for a declared one.
_HELD_BY: Final = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
# The part of an image that holds its file; the other is a name.
_BYTES: Final = "bytes"


class RowFiles:
    """The parquet files of a data set, and the row groups that were read last."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._held: dict[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], Any]] = {}

    def read(self, file: str, rows: range, columns: Sequence[str], *, all_rows: bool) -> Any:
        """Some rows and columns of a file, as a pyarrow table.

        Args:
            file: relative to the data set.
            rows: the rows.
            columns: the columns.
            all_rows: whether the file may have no others.

        Raises:
            DatasetError: the file is missing or damaged, has more or fewer rows, or lacks a column.
        """
        path = self._path / file
        with opened(path) as parquet:
            check_columns(path, parquet, columns)
            counts = [
                parquet.metadata.row_group(group).num_rows
                for group in range(parquet.metadata.num_row_groups)
            ]
            ends = np.cumsum([0, *counts])
            if rows.stop > ends[-1] or (all_rows and rows.stop < ends[-1]):
                raise DatasetError(
                    f"{path}: has {ends[-1]} rows, the table of episodes counts {rows.stop}; copy "
                    "the data set again"
                )
            first = int(np.searchsorted(ends, rows.start, side="right")) - 1
            last = int(np.searchsorted(ends, rows.stop, side="left"))
            groups = tuple(range(first, last))
            # Files may hold one row group of many episodes, which are often read one by one.
            held = self._held.get(tuple(columns))
            if held is None or held[0] != (file, groups):
                table = parquet.read_row_groups(
                    list(groups), columns=list(columns), use_threads=False
                )
                held = (file, groups), table
                self._held[tuple(columns)] = held
        return held[1].slice(rows.start - int(ends[first]), len(rows))


@dataclass(frozen=True)
class StoredPictures(LazyPictures):
    """Pictures of an episode that are a column of its rows."""

    files: RowFiles
    file: str
    rows: range
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, kept: slice) -> Self:
        return replace(self, rows=self.rows[kept])

    def only(self, steps: Collection[int]) -> Sequence[bytes | NpArray]:
        """Reads some pictures, as files; the others are empty."""
        column = self._column()
        return [_file(column[step]) if step in steps else b"" for step in range(len(self))]

    def read(self, steps: Sequence[int]) -> list[bytes | NpArray | DatasetError]:
        """The files of some steps."""
        column = self._column()
        return [_file(column[step]) for step in steps]

    def _column(self) -> Any:
        table = self.files.read(self.file, self.rows, [self.column], all_rows=False)
        return table.column(self.column)


def _file(scalar: Any) -> bytes:
    value = scalar.as_py()
    file = value.get(_BYTES) if isinstance(value, dict) else value
    # An empty file, which `Pictures` refuses with the step's name.
    return file if isinstance(file, bytes) else b""


def values(column: Any, name: str, feature: Feature) -> NpArray | list[Any]:
    """The values of a column, one for each step: an array of numbers, or a list of texts.

    Raises:
        DatasetError: a value is missing, or the column is not what the data set declares.
    """
    if column.null_count:
        step = next(i for i, value in enumerate(column) if not value.is_valid)
        raise DatasetError(f"step {step}: {name}: the value is missing")
    if feature.dtype.kind not in "biuf":
        return column.to_pylist()
    try:
        array = np.asarray(column.to_pylist())
    except ValueError as error:
        raise DatasetError(f"{name}: steps differ in shape") from error
    if array.dtype.kind not in _HELD_BY[feature.dtype.kind]:
        raise DatasetError(f"{name}: found {array.dtype}, the data set declares {feature.dtype}")
    if array.shape[1:] == (1,) and not feature.shape:
        array = array[:, 0]  # a list of one number
    if array.shape[1:] != feature.shape:
        raise DatasetError(
            f"{name}: found shape {list(array.shape[1:])}, the data set declares "
            f"{list(feature.shape)}"
        )
    return array.astype(feature.dtype)
