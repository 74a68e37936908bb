"""Keeps finished items of a sweep, so that a killed sweep resumes where it stopped.

A sweep has one folder, named by a hash of everything that its values depend on; items of a sweep
with other settings, another policy or another version are never reused. Each item is a file that
appears under its name only when it is complete. With several processes, the main one reads and
writes, and broadcasts to the others.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax import sharding
from qvla_jax.array_files import read_npy
from qvla_jax.atomic import write_bytes, write_json
from qvla_jax.errors import InputError

_MANIFEST = "sweep.json"
_SUFFIX = ".npy"


class Items:
    """The items of one sweep, by name.

    Args:
        folder: where they are kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._finished = frozenset() if folder is None else _names(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._finished

    def get(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The item of this name: the stored one, or a new one, which is then stored.

        Raises:
            InputError: the stored item cannot be read.
        """
        if self._folder is None:
            return compute()
        path = self._folder / (name + _SUFFIX)
        if name in self._finished:
            return _read(path)
        value = compute()
        if sharding.is_main_process():
            buffer = io.BytesIO()
            np.save(buffer, value, allow_pickle=False)
            write_bytes(path, buffer.getvalue())
        return value


NOTHING_KEPT = Items(None)


@dataclasses.dataclass(frozen=True)
class SweepStore:
    """A folder of sweeps.

    Args:
        folder: created when the first item is finished.
        made_from: JSON object with everything that all sweeps here depend on: policy, calibration
            set, quantizer, versions.
    """

    folder: Path
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def knowing(self, **made_from: Any) -> "SweepStore":
        """The same folder, for sweeps that also depend on these."""
        return dataclasses.replace(self, made_from={**self.made_from, **made_from})

    def sweep(self, **settings: Any) -> Items:
        """The items of the sweep with these settings (JSON values)."""
        manifest = {**self.made_from, **settings}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        folder = self.folder / digest[:16]
        if sharding.is_main_process() and not (folder / _MANIFEST).exists():
            write_json(folder / _MANIFEST, manifest)
        return Items(folder)


def digest_of(*arrays: np.ndarray) -> str:
    """A hash of arrays, for settings."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _names(folder: Path) -> frozenset[str]:
    """Finished items as the main process sees them; temporary files start with a dot."""
    names = sorted(p.stem for p in folder.glob(f"[!.]*{_SUFFIX}"))
    listed = sharding.from_main_process("\n".join(names).encode()).decode()
    return frozenset(listed.split("\n")) if listed else frozenset()


def _read(path: Path) -> np.ndarray:
    data = b""
    if sharding.is_main_process():
        try:
            data = path.read_bytes()
            read_npy(data)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: a finished item of a sweep cannot be read ({error}); remove the file, "
                "and it is computed again"
            ) from error
    return read_npy(sharding.from_main_process(data))
