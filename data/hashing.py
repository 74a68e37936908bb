"""Hashes of data files."""

import hashlib
from typing import Any, Final

from etils import epath

_SAMPLE_BYTES: Final = 1 << 16
_BLOCK_BYTES: Final = 1 << 22


def digest(path: epath.Path) -> str:
    """The sha256 of a file."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


def sample(path: epath.Path, name: str, hashed: Any) -> None:
    """Adds a file's name, its size and both its ends to a hash."""
    size = path.stat().length
    hashed.update(f"{name} {size}".encode())
    with path.open("rb") as file:
        hashed.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        hashed.update(file.read(_SAMPLE_BYTES))
