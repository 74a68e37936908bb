"""Orbax checkpoints as openpi writes them: read a slice of a leaf at a time, written by leaf.

A tree is flat here: keys joined by slashes (`PaliGemma/llm/embedder/input_embedding`), without the
outermost `params`. openpi's trainer appends one more key, `value`, to every leaf; released
checkpoints do not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qvla_jax.checkpoints.orbax_weights import quiet
from qvla_jax.checkpoints.weights import is_finite
from qvla_jax.errors import CheckpointError

# The only key at the top of the tree.
_ROOT: Final = "params"
# Appended to every leaf by the trainer.
_VALUE: Final = "value"
_FLOATS: Final = ("float32", "bfloat16", "float16")
# Read and held at once of a leaf with several layers. A chunk that is larger is read again for its
# other layers, which takes less time than its memory is worth.
_BLOCK_BYTES: Final = 1 << 29
# Largest chunk that is written.
_CHUNK_BYTES: Final = 1 << 27


class StoredTree(Mapping[str, "StoredLeaf"]):
    """The leaves of a `params` folder; nothing is read of them yet."""

    def __init__(self, folder: Path):
        """Reads names, shapes and dtypes.

        Raises:
            CheckpointError: the folder is missing or damaged, or a leaf is no array of floats.
        """
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: missing")
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, quiet():
                described: Any = checkpointer.metadata(folder.resolve()).item_metadata
            tree = described.tree
            found = dict(_flatten(tree[_ROOT], ()))
        except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{folder}: not a readable orbax checkpoint with a tree {_ROOT!r} ({reason})"
            ) from error
        if unexpected := sorted(set(tree) - {_ROOT}):
            raise CheckpointError(f"{folder}: key {unexpected[0]!r} beside {_ROOT!r} is unexpected")
        # Whether every leaf has the trainer's key; a leaf may have that name by itself.
        self.value_keys = bool(found) and all(keys[-1] == _VALUE for keys in found)
        self._leaves = {}
        for keys, array in found.items():
            name = "/".join(keys[:-1] if self.value_keys else keys)
            stored = ".".join((_ROOT, *keys))
            self._leaves[name] = StoredLeaf(folder, name, stored, array)

    def __getitem__(self, name: str) -> "StoredLeaf":
        return self._leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


class StoredLeaf:
    """One array of a checkpoint."""

    def __init__(self, folder: Path, name: str, stored: str, described: Any):
        self.folder, self.name, self._stored = folder, name, stored
        self.shape: tuple[int, ...] = tuple(described.shape)
        self.dtype = np.dtype(described.dtype)
        if self.dtype.name not in _FLOATS:
            raise CheckpointError(
                f"{folder}: parameter {name!r} has dtype {self.dtype}, expected one of "
                f"{', '.join(_FLOATS)}"
            )
        self._store: Any = None
        self._rows: tuple[int, np.ndarray] | None = None

    def read(self, index: tuple[int, ...] = ()) -> np.ndarray:
        """The array at an index of its first axes.

        Neighbors along the first axis that are stored together are read together, up to half a
        gigabyte, and held until another part or `close` is requested, so indices should be read in
        order.

        Raises:
            CheckpointError: the array cannot be read, or this part of it holds NaN or inf.
        """
        try:
            value = self._part(index)
        except (ValueError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{self.folder}: parameter {self.name!r} cannot be read ({reason})"
            ) from error
        if not is_finite(value):
            raise CheckpointError(f"{self.folder}: parameter {self.name!r} holds NaN or inf")
        return value

    def close(self) -> None:
        """Releases what was read."""
        self._store = self._rows = None

    def _part(self, index: tuple[int, ...]) -> np.ndarray:
        if self._store is None:
            self._store = ts.open(_spec(self.folder, self._stored), open=True, read=True).result()
            if tuple(self._store.shape) != self.shape:
                raise ValueError(f"the array has shape {list(self._store.shape)}")
        if not index:
            return self._store.read().result()
        together = self._store.chunk_layout.read_chunk.shape[0]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = max(min(together, _BLOCK_BYTES // row_bytes), 1)
        start = index[0] // rows * rows
        if self._rows is None or self._rows[0] != start:
            self._rows = None  # before the next is read
            stop = min(start + rows, self.shape[0])
            self._rows = start, self._store[start:stop].read().result()
        return self._rows[1][(index[0] - start, *index[1:])]


def _spec(folder: Path, name: str) -> dict[str, Any]:
    """Where tensorstore finds an array: in a database of all, or in a folder of its own."""
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    if (folder / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        store = {**base, "path": f"{folder.resolve()}/{name}/"}
    zarr3 = (folder / name / "zarr.json").is_file()
    if "base" in store:
        keys = ts.KvStore.open({**store}).result()
        zarr3 = keys.read("zarr.json").result().state == "value"
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}


def _flatten(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _flatten(child, (*keys, str(key)))
    else:
        yield keys, node


@dataclasses.dataclass(frozen=True)
class Parts:
    """An array that is written part by part."""

    shape: tuple[int, ...]
    # Gives, when its turn has come, each index of the first axes and what belongs there; all parts
    # have one dtype.
    make: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]


class _PartsHandler(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, so that no more than a part is in memory."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        for parts, info in zip(values, infos, strict=True):
            store: Any = None
            for index, value in parts.make():
                if store is None:
                    place = Path(str(info.parent_dir)) / str(info.name)
                    store = _create(place, parts.shape, len(index), value.dtype)
                store[index].write(value).result()
        return []


def _create(place: Path, shape: tuple[int, ...], leading: int, dtype: np.dtype[Any]) -> Any:
    """A new array, in chunks of one part or less: what is read by parts is decoded once."""
    part = shape[leading:]
    row_bytes = math.prod(part[1:]) * dtype.itemsize
    rows = [min(part[0], max(_CHUNK_BYTES // row_bytes, 1))] if part else []
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": {
            "chunks": [1] * leading + rows + list(part[1:]),
            "compressor": {"id": "zstd", "level": 1},
        },
    }
    return ts.open(spec, create=True, dtype=ts.dtype(dtype.name), shape=shape).result()


def write_tree(folder: Path, leaves: Mapping[str, Parts], *, value_keys: bool = False) -> None:
    """Writes a `params` folder; it appears when it is complete.

    Each parameter has a folder of its own, which openpi reads as it reads its own database of all:
    gathered there, all parameters would be held in memory until the end.

    Args:
        folder: does not exist yet.
        leaves: name -> the array.
        value_keys: append the trainer's key to every leaf.
    """
    tree: dict[str, Any] = {}
    for name, parts in leaves.items():
        *parents, last = (*name.split("/"), *([_VALUE] if value_keys else []))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = parts
    registry = ocp.type_handlers.create_type_handler_registry(
        (Parts, _PartsHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer, quiet():
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave({_ROOT: tree}))
