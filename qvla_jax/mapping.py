"""Files mapped into memory, whose pages are let go when the arrays that were read of them are."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np


class Region:
    """Bytes of a mapped file; the base of the arrays over them."""

    def __init__(self, mapping: mmap.mmap, offset: int, size: int):
        self._mapping, self._offset, self._size = mapping, offset, size
        address = np.frombuffer(mapping, np.uint8).ctypes.data + offset
        self.__array_interface__ = {
            "version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True),
        }  # fmt: skip

    def release(
        self, page: int = mmap.PAGESIZE, advice: int | None = getattr(mmap, "MADV_DONTNEED", None)
    ) -> None:
        """Takes the bytes out of resident memory; they are read again when they are used again.

        Defaults are bound here, because the last arrays may go after the modules.
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
    """A file's bytes, which must be some; read-only, read when they are used."""
    return np.asarray(Region(map_file(path), 0, path.stat().st_size))


def release_pages(array: Any) -> None:
    """Takes a mapped tensor out of resident memory; it is read again when it is used again."""
    region = region_of(array)
    if region is not None:
        region.release()


def region_of(array: Any) -> Region | None:
    """The bytes of a file that an array is a view of; None if it is none."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, Region) else None
