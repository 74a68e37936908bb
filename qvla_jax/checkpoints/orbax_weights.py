"""Weights as an orbax checkpoint: written one tensor at a time, restored onto any sharding.

The tree is flat: dotted Flax path (`language_model.model.norm.scale`) -> array in Flax's layout.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qvla_jax.checkpoints.checksums import check_checksums, write_checksums
from qvla_jax.checkpoints.weights import Source, flax_leaves, through_flax
from qvla_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array that is made when it is written."""

    make: Callable[[], np.ndarray]


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves one after the other, so that only one is in memory."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for leaf, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([leaf.make()], [info], [arg]):
                written.result()
        return []


class _EveryRead:
    """Waits for every read before raising the first error, and names its parameter.

    An abandoned read would outlive its event loop and print errors to stderr.
    """

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        handler: Any = super()
        return await _every([handler.metadata([info]) for info in infos], infos)

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> Sequence[Any]:
        handler: Any = super()
        args = args or [ocp.RestoreArgs()] * len(infos)
        reads = [handler.deserialize([i], [a]) for i, a in zip(infos, args, strict=True)]
        return await _every(reads, infos)


async def _every(
    reads: Sequence[Awaitable[Sequence[Any]]], infos: Sequence[ocp.type_handlers.ParamInfo]
) -> Sequence[Any]:
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    for info, outcome in zip(infos, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            reason = (str(outcome) or type(outcome).__name__).splitlines()[0]
            raise CheckpointError(
                f"{info.parent_dir}: parameter {info.name!r} cannot be read ({reason})"
            ) from outcome
    return [outcome[0] for outcome in outcomes if not isinstance(outcome, BaseException)]


class _NumpyReader(_EveryRead, ocp.type_handlers.NumpyHandler):
    """Restores onto the host."""


class _ArrayReader(_EveryRead, ocp.type_handlers.ArrayHandler):
    """Restores onto a sharding."""


def save_orbax(
    path: Path, model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: Source
) -> None:
    """Imports public tensors into an orbax checkpoint, one at a time.

    Args:
        path: a folder that does not exist yet; it appears when complete, and gets its list of
            checksums last.
        model: abstract or not; its parameters' dtypes are those written.
        tensors: public name -> tensor.
        source: the name in error messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape, NaN or infinite.
    """
    convert = through_flax(model, tensors, source=source)

    def leaf(name: str, dtype: Any) -> _Leaf:
        return _Leaf(lambda: np.ascontiguousarray(convert(name, dtype)[1]))

    tree = {path: leaf(name, v.dtype) for path, (name, v) in flax_leaves(model).items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # One file per parameter: large combined files would be held in memory until the end.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer, quiet():
        checkpointer.save(path.resolve(), args=ocp.args.PyTreeSave(tree))
    write_checksums(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from warning about absent large files and missing shardings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_orbax(
    model: nnx.Module, path: Path, *, sharding: jax.sharding.Sharding | None = None
) -> None:
    """Fills the parameters of `model`, in place, in their dtypes.

    Args:
        model: arrays, or shapes and dtypes.
        path: what `save_orbax` wrote.
        sharding: of every parameter; None puts it on the default device.

    Raises:
        CheckpointError: the checkpoint is damaged (each file must be byte for byte as written), or
            a parameter is missing, unexpected or of the wrong shape. The message names it.
    """
    variables = {name: variable for name, (_, variable) in flax_leaves(model).items()}
    with _reading(path) as checkpointer:
        _check(variables, _metadata(checkpointer, path), path)
        # Orbax commits an array to its devices; without a sharding it must follow the inputs.
        arguments = {
            name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=v.dtype)
            if sharding is None
            else ocp.ArrayRestoreArgs(sharding=sharding, dtype=v.dtype)
            for name, v in variables.items()
        }
        restored = checkpointer.restore(
            path.resolve(), args=ocp.args.PyTreeRestore(restore_args=arguments)
        )
    # Last, because the reader's errors are more specific.
    check_checksums(path, remedy="import the policy again")
    for name, variable in variables.items():
        variable.set_value(jax.device_put(restored.pop(name), sharding))


def orbax_dtypes(model: nnx.Module, path: Path) -> dict[str, np.dtype[Any]]:
    """Public name -> stored dtype, checked as `load_orbax` does, without reading a weight.

    Raises:
        CheckpointError: see `load_orbax`.
    """
    leaves = flax_leaves(model)
    with _reading(path) as checkpointer:
        stored = _metadata(checkpointer, path)
        _check({leaf: variable for leaf, (_, variable) in leaves.items()}, stored, path)
    return {name: np.dtype(stored[leaf].dtype) for leaf, (name, _) in leaves.items()}


def _metadata(checkpointer: ocp.Checkpointer, path: Path) -> Mapping[str, Any]:
    item: Any = checkpointer.metadata(path.resolve()).item_metadata
    return item.tree


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[ocp.Checkpointer]:
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _NumpyReader()), (jax.Array, _ArrayReader())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            yield checkpointer
        except (ValueError, OSError, KeyError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: not a readable orbax checkpoint ({reason})") from error


def _check(variables: Mapping[str, nnx.Variable], stored: Mapping[str, Any], path: Path) -> None:
    if missing := sorted(variables.keys() - stored.keys()):
        shape = variables[missing[0]].shape
        raise CheckpointError(f"{path}: parameter {missing[0]!r} of shape {shape} is missing")
    if unexpected := sorted(stored.keys() - variables.keys()):
        raise CheckpointError(f"{path}: parameter {unexpected[0]!r} is unexpected")
    for name, variable in variables.items():
        if tuple(stored[name].shape) != variable.shape:
            raise CheckpointError(
                f"{path}: parameter {name!r} has shape {tuple(stored[name].shape)}, expected "
                f"{variable.shape}"
            )
