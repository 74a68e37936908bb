"""Writers on a full and on a read-only disk: a small file system in memory, which takes root."""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qvla_jax.array_files import write_arrays
from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.tensor_files import write_file
from qvla_jax.checkpoints.torch_writer import write_torch_zip
from qvla_jax.errors import InputError

_SMALL, _LARGE = 1000, 1_000_000
# Each writes a file of about 4 bytes for each number.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "x.safetensors": lambda p, n: write_arrays(p, {"a": _floats(n)}, {}, kind="x"),
    "x.npz": lambda p, n: write_arrays(p, {"a": _floats(n)}, {}, kind="x"),
    "x.qvla": lambda p, n: write_file(p, [("a", _floats(n))], dict),
    "x.pt": lambda p, n: write_torch_zip(p, {"a": _floats(n)}),
    "x.json": lambda p, n: write_json(p, [0.5] * n),
}


def _floats(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


def disk(folder: Path) -> str:
    """Checks every writer; says what happened."""
    messages = []
    with _mounted(folder):
        for name, write in WRITERS.items():
            write(folder / name, _SMALL)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(before) == set(WRITERS)
        for options in (None, "remount,ro"):
            if options:
                subprocess.run(["mount", "-o", options, str(folder)], check=True)
            for name, write in WRITERS.items():
                where = re.escape(str(folder / name))
                with pytest.raises(InputError, match=where) as error:
                    write(folder / name, _LARGE)
                messages.append(str(error.value))
                assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    return f"disk: {len(messages)} refused writes, old files whole; such as {messages[0]!r}"


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
