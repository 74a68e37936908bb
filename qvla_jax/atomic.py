"""Writes files completely or not at all.

Each function writes to a temporary name in the destination's folder and renames it into place, so
that a killed process, a full disk or an exception leaves the previous file (or nothing) and never
half of a new one.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvla_jax.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends without an exception.

    The temporary name keeps the suffix of `path`, because some writers choose their format by it.
    The file is flushed to disk before the rename. If the block raises, the temporary file is
    removed and `path` is untouched.

    Args:
        path: the destination; its parent folders are created.

    Raises:
        InputError: it cannot be written: the disk is full, or the folder is read-only or not a
            folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent
        )
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; results are ordinary ones
        temporary.replace(path)
    except OSError as error:
        # An error that names another file concerns an input, not this output.
        if error.filename in (None, name):
            raise _cannot_write(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` to `path` atomically, as indented JSON.

    Args:
        path: the destination.
        obj: anything that `json` can encode. NaN and infinities are refused: they are not JSON.

    Raises:
        ValueError: a number in `obj` is not finite.
    """
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def _cannot_write(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(
        f"{path}: cannot be written ({reason}); what was there before is untouched. Make room or "
        "choose another place"
    )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
