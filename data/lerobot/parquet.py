"""Reads columns of parquet files, with errors that name the file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from etils import epath

from qvla_jax.errors import DatasetError, QvlaError, first_line
from qvla_jax.remote.folder import ensure

_COPY: Final = "copy the data set again"


@contextmanager
def opened(path: epath.Path) -> Iterator[Any]:
    """A parquet file (pyarrow.parquet.ParquetFile).

    Raises:
        DatasetError: it is missing or damaged, also where it is read inside of the context.
    """
    arrow, parquet = _library()
    ensure(Path(path))
    if not path.exists():
        raise DatasetError(f"{path}: missing; {_COPY}")
    try:
        # Not a file of Python's: threads of pyarrow would call it.
        source = arrow.BufferReader(path.read_bytes()) if "://" in str(path) else str(path)
        with parquet.ParquetFile(source) as file:
            yield file
    except QvlaError:
        raise
    except Exception as error:
        # Damaged files raise almost anything.
        first = first_line(error)
        raise DatasetError(
            f"{path}: cannot be read; it is truncated or damaged ({first}); {_COPY}"
        ) from error


def check_columns(path: epath.Path, file: Any, columns: Sequence[str]) -> None:
    """Checks that a parquet file has columns.

    Raises:
        DatasetError: one is missing.
    """
    names = file.schema_arrow.names
    if missing := [column for column in columns if column not in names]:
        raise DatasetError(
            f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(names)}"
        )


def _library() -> tuple[Any, Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DatasetError(
            "LeRobot data sets need pyarrow: pip install 'qvla-jax[lerobot]'"
        ) from error
    return arrow, parquet
