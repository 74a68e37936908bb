"""Memory-mapped files, whose pages are released together with the arrays read from them."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np


class Region:
    """Bytes of a mapped file; the base of the arrays that view them."""

    def __init__(self, mapping: mmap.mmap, offset: int, size: int):
        self._mapping, self._offset, self._size = mapping, offset, size
        address = np.frombuffer(mapping, np.uint8).ctypes.data + offset
        self.__array_interface__ = {
            "version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True),
        }  # fmt: skip

    def release(
        self, page: int = mmap.PAGESIZE, advice: int | None = getattr(mmap, "MADV_DONTNEED", None)
    ) -> None:
        """Releases the bytes from resident memory; they are read again on the next use.

        Defaults are bound here, because the last arrays may outlive the modules.
        """
        if advice is not None:
            start = self._offset // page * page
            self._mapping.madvise(advice, start, self._offset + self._size - start)

    def __del__(self) -> None:
        self.release()


def map_file(path: Path) -> mmap.mmap:
    """Maps a whole file, read-only."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def mapped_bytes(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty; read-only, and read on first use."""
    return np.asarray(Region(map_file(path), 0, path.stat().st_size))


def release_pages(array: Any) -> None:
    """Releases a mapped tensor from resident memory; it is read again on the next use."""
    region = region_of(array)
    if region is not None:
        region.release()


def region_of(array: Any) -> Region | None:
    """The bytes of a file that an array views; None if it views no file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, Region) else None
