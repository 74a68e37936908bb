"""Flax parameters <-> tensors with the public (PyTorch) names and layouts, in safetensors.

Module paths are the public ones already; only the leaf differs:

| Flax                | public          | layout                                   |
|---------------------|-----------------|------------------------------------------|
| `Linear.kernel`     | `weight`        | [k, c] -> [c, k]                         |
| `patch_embed.proj`  | `weight`        | [3 p p, c] -> [c, 3, p, p]               |
| `*Norm.scale`       | `weight`        | unchanged                                |
| `Embed.embedding`   | `weight`        | unchanged                                |
| anything else       | the same        | unchanged                                |
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from qvla_jax.atomic import atomic_path
from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.errors import CheckpointError
from qvla_jax.mapping import Spool, region_of, release_pages
from qvla_jax.models.surgery import path_string

# The source in error messages: a file, or a function from a tensor's name to its file.
Source = str | Callable[[str], str]

# Numbers that are checked at once.
_CHECKED: Final = 1 << 24
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def _parameters(model: nnx.Module) -> Iterator[tuple[str, str, nnx.Variable]]:
    """(public name, Flax leaf name, variable) of every parameter."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parent, leaf = path
        name = path_string((*parent, _LEAF_NAMES.get(str(leaf), leaf)))
        yield name, str(leaf), variable


def flax_leaves(model: nnx.Module) -> dict[str, tuple[str, nnx.Variable]]:
    """Dotted Flax path -> (public name, variable) of every parameter."""
    return {
        f"{name.rpartition('.')[0]}.{leaf}": (name, variable)
        for name, leaf, variable in _parameters(model)
    }


def _public_shape(name: str, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if leaf != "kernel":
        return shape
    fan_in, channels = shape
    if ".patch_embed." in name:
        patch = math.isqrt(fan_in // 3)
        return channels, 3, patch, patch
    return channels, fan_in


def public_tensors(model: nnx.Module, *, dtype: jnp.dtype | None = None) -> dict[str, np.ndarray]:
    """All parameters under their public names and in their public layouts.

    Args:
        model: a module whose paths follow the public checkpoints.
        dtype: cast to this; None keeps the parameters' own.
    """
    tensors = {}
    for name, leaf, variable in _parameters(model):
        value = np.asarray(variable[...])
        if dtype is not None:
            value = value.astype(dtype)
        tensors[name] = public_layout(name, leaf, value)
    return tensors


def public_items(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Like `public_tensors`, in order of names and one at a time; values may be in files."""
    for name, leaf, variable in sorted(_parameters(model), key=lambda entry: entry[0]):
        yield name, public_layout(name, leaf, np.asarray(variable[...]))
        release_pages(variable.get_value())


def save_weights(model: nnx.Module, path: Path, *, dtype: jnp.dtype | None = None) -> None:
    """Writes all parameters to one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        try:
            safetensors.numpy.save_file(public_tensors(model, dtype=dtype), temporary)
        except safetensors.SafetensorError as error:  # a full disk, in the library's words
            raise OSError(str(error)) from error


def load_weights(
    model: nnx.Module, path: Path, *, sharding: jax.sharding.Sharding | None = None
) -> None:
    """Fills the parameters of `model` from a safetensors file, in place, one tensor at a time.

    Values are cast to the parameters' dtype, which must be able to hold them.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors; a tensor is missing,
            unexpected, of the wrong shape, or holds NaN or inf. The message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    assign_tensors(model, TensorFile(path), source=str(path), sharding=sharding)


def assign_tensors(
    model: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    *,
    source: Source,
    sharding: jax.sharding.Sharding | None = None,
    mapped: bool = False,
) -> None:
    """Fills the parameters of `model` from public tensors, read and placed one at a time.

    After an error the model is partly filled and unusable. See `load_weights` for errors.

    Args:
        model: arrays or, from `abstract_model`, shapes and dtypes.
        tensors: public name -> tensor.
        source: the file named in errors, or a function of the tensor's name.
        sharding: sharding of every parameter; None uses the default device.
        mapped: leave the parameters in their files, in the files' dtypes: numpy arrays that are
            read on each use. Those that no file holds as they are go into a temporary one.
    """
    kernels = {id(variable) for _, leaf, variable in _parameters(model) if leaf == "kernel"}
    with Spool(_spool_bytes(model)) as spool:
        for variable, value in flax_tensors(model, tensors, source=source, cast=not mapped):
            # Not an assignment into an array, because an abstract model has none yet.
            if not mapped:
                # A copy: files are closed, and buffers used again.
                variable.set_value(jax.device_put(value, sharding, may_alias=False))
                continue
            kept = value
            if region_of(value) is None:
                # The rows of a kernel's channels lie one after the other, as in other files.
                kept = spool.add(np.asfortranarray(value) if id(variable) in kernels else value)
            variable.set_value(kept)
            release_pages(kept)


def _spool_bytes(model: nnx.Module) -> int:
    """Bytes that all parameters take at most, each from a page of its own on."""
    sizes = (math.prod(v.shape) for _, _, v in _parameters(model))
    return sum(8 * size + mmap.PAGESIZE for size in sizes)


def flax_tensors(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: Source, cast: bool = True
) -> Iterator[tuple[nnx.Variable, np.ndarray]]:
    """Each parameter with its value in Flax's layout, one at a time, in the order of the tensors.

    The value has the parameter's dtype or, without `cast`, the tensor's.
    """
    convert = through_flax(model, tensors, source=source)
    variables = {name: variable for name, _, variable in _parameters(model)}
    for name in tensors:
        variable = variables[name]
        _, value = convert(name, variable.dtype if cast else None)
        yield variable, value


def through_flax(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: Source
) -> Callable[..., tuple[str, np.ndarray]]:
    """Checks all names; returns (name, dtype or None) -> (leaf's name, value in Flax's layout).

    Raises:
        CheckpointError: a tensor is missing or unexpected; later, if one does not fit.
    """
    parameters = _matched(model, tensors, source)

    def convert(name: str, dtype: Any = None) -> tuple[str, np.ndarray]:
        leaf, variable = parameters[name]
        value = tensors[name]
        check_shape(name, value, _public_shape(name, leaf, variable.shape), source)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise CheckpointError(
                f"{file_named(source, name)}: tensor {name!r} holds {value.dtype}, expected "
                "floating point: quantized weights are not read"
            )
        if dtype is not None:
            value = value.astype(dtype, copy=False)
        if not is_finite(value):
            raise CheckpointError(f"{file_named(source, name)}: tensor {name!r} holds NaN or inf")
        return leaf, value.reshape(variable.shape[::-1]).T if leaf == "kernel" else value

    return convert


def is_finite(value: np.ndarray) -> bool:
    """Whether there is neither NaN nor inf, without a copy of the whole."""
    flat = value.ravel(order="K")
    return all(
        np.isfinite(flat[start : start + _CHECKED]).all() for start in range(0, flat.size, _CHECKED)
    )


def file_named(source: Source, name: str) -> str:
    """The file that an error about a tensor names."""
    return source if isinstance(source, str) else source(name)


def check_shapes(model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: Source) -> None:
    """Checks that every parameter has a tensor of the right shape, and that there are no others.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    for name, (leaf, variable) in _matched(model, tensors, source).items():
        expected = _public_shape(name, leaf, variable.shape)
        check_shape(name, tensors[name], expected, source)


def _matched(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], source: Source
) -> dict[str, tuple[str, nnx.Variable]]:
    """Public name -> (leaf's name, variable); raises if the names differ from the tensors'."""
    parameters = {name: (leaf, variable) for name, leaf, variable in _parameters(model)}
    missing = sorted(parameters.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - parameters.keys())
    if missing:
        name = missing[0]
        leaf, variable = parameters[name]
        expected = _public_shape(name, leaf, variable.shape)
        found = f"; there is {unexpected[0]!r}, which is unexpected" if unexpected else ""
        raise CheckpointError(
            f"{file_named(source, name)}: tensor {name!r} of shape {expected} is missing "
            f"({len(missing)} in all){found}"
        )
    if unexpected:
        name = unexpected[0]
        raise CheckpointError(
            f"{file_named(source, name)}: tensor {name!r} of shape {tensors[name].shape} is "
            f"unexpected ({len(unexpected)} in all): the file belongs to another architecture"
        )
    return parameters


def check_shape(name: str, value: np.ndarray, expected: tuple[int, ...], source: Source) -> None:
    """Checks one tensor's shape.

    Raises:
        CheckpointError: the shape is wrong. The message names the tensor and its file.
    """
    if value.shape != expected:
        raise CheckpointError(
            f"{file_named(source, name)}: tensor {name!r} has shape {value.shape}, expected "
            f"{expected}"
        )


def public_layout(name: str, leaf: str, value: np.ndarray) -> np.ndarray:
    """A parameter's value in its public layout."""
    shape = _public_shape(name, leaf, value.shape)
    return np.ascontiguousarray(value.T if leaf == "kernel" else value).reshape(shape)


def public_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Public name -> shape; the model may be abstract."""
    return {n: _public_shape(n, leaf, v.shape) for n, leaf, v in _parameters(model)}
