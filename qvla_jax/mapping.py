"""Memory-mapped files, whose pages are released together with the arrays read from them."""

import mmap
import tempfile
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from qvla_jax.errors import InputError


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


class Spool:
    """Keeps arrays in a temporary file, which is gone as soon as nothing views it.

    For tensors that no file holds as they are, such as those of a compressed checkpoint: they are
    mapped as if they came from a file of their own. Arrays are added while it is used as a context
    manager.
    """

    def __init__(self, capacity: int):
        """Prepares; the file is made when the first array comes, and takes space as they come.

        Args:
            capacity: bytes of all arrays, each rounded up to whole pages, at most.
        """
        self._capacity, self._end = capacity, 0
        self._file: IO[bytes] | None = None
        self._mapping: mmap.mmap | None = None

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *raised: object) -> None:
        """No more arrays come."""
        if self._file is not None:
            self._file.close()  # the mapping keeps it

    def add(self, array: np.ndarray) -> np.ndarray:
        """The array as a read-only view of the file, in the same order in memory.

        Raises:
            InputError: the folder of temporary files has no room.
        """
        rows = array.T if array.flags.f_contiguous else np.ascontiguousarray(array)
        start, size = self._end, array.nbytes
        self._end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="qvla-")  # noqa: SIM115 (see __exit__)
                self._file.truncate(self._capacity)
            if self._mapping is None:
                number = self._file.fileno()
                self._mapping = mmap.mmap(number, self._capacity, access=mmap.ACCESS_READ)
            self._file.seek(start)
            self._file.write(rows.reshape(-1).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: no room to keep decoded weights ({error.strerror}); "
                "name another folder in the environment variable TMPDIR"
            ) from error
        kept = np.asarray(Region(self._mapping, start, size)).view(array.dtype).reshape(rows.shape)
        return kept.T if array.flags.f_contiguous else kept


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
