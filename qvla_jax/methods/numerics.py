"""qwix's quantizer as every method here uses it: symmetric integers, absmax, rows [c, k].

A row, or each group of g inputs of it, has the scale (Qwix, `numerics.get_symmetric_bound`)

    s = max|w| / (2^(b-1) - 1/2),   q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),

which gives the outermost code a whole step. qwix stores 2- and 3-bit codes in 4-bit integers, and
wants groups that divide the row; the packed layout stores them in their own width and a shorter
last group, so codes and scales are taken from qwix and the storage from here. Scales are rounded to
bfloat16 after the codes are chosen, as by qwix's own `scale_dtype`.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import qwix

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import GRID_BITS as WIDTHS
from qvla_jax.quantization.rows import QuantizedRows


@dataclasses.dataclass(frozen=True)
class HowToQuantize:
    """The attributes that qwix's functions read from their argument `how`, of a private class."""

    qtype: Any
    channelwise_axes: tuple[int, ...]
    # Inputs that share a scale, by axis.
    tiled_axes: dict[int, int]
    calibration_method: str = "absmax"
    noise_fn: None = None


class _SyntheticType:
    """qwix's "int2" and "int3", which numpy reads as the 4-bit integers that qwix keeps them in.

    GPTQ in qwix allocates its result with `dtype=how.qtype`, where the plain names are not dtypes.
    """

    dtype: Final = np.dtype(ml_dtypes.int4)

    def __init__(self, name: str):
        self._name = name

    def __eq__(self, other: object) -> bool:
        return self._name == (other._name if isinstance(other, _SyntheticType) else other)

    def __hash__(self) -> int:
        return hash(self._name)

    def __getitem__(self, item: slice) -> str:
        return self._name[item]


@contextlib.contextmanager
def qwix_context() -> Iterator[None]:
    """Surrounds calls of qwix with JAX's default promotion, which it relies on.

    Silences warnings about names that Flax has renamed and qwix 0.1.8 still uses.
    """
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def how_to_quantize(bits: int, group: int | None) -> Any:
    """The `HowToQuantize` of rows [c, k] at these bits, as qwix's own type to a type checker.

    Raises:
        InputError: qwix or the packed layout has no such width.
    """
    native: dict[int, Any] = {8: jnp.int8, 4: jnp.int4}
    if bits not in WIDTHS:
        raise InputError(f"no grid here has {bits} bits; choose from {WIDTHS}")
    qtype: Any = native.get(bits) or _SyntheticType(f"int{bits}")
    return HowToQuantize(
        qtype=qtype,
        channelwise_axes=(0,),
        tiled_axes={} if group is None else {1: group},
    )


def padded(weight: Float[Array, "c k"], group: int | None) -> Float[Array, "c k"]:
    """Appends zero inputs up to whole groups; they have code 0 and change no scale."""
    extra = 0 if group is None else -weight.shape[1] % group
    return jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, extra)))


def effective_group(fan_in: int, group: int | None) -> int | None:
    """The group; None where one group holds the whole row."""
    return None if group is None or group >= fan_in else group


def taken(array: qwix.QArray, fan_in: int, bits: int, group: int | None) -> QuantizedRows:
    """Codes and stored scales of qwix's array, without padded inputs.

    Args:
        array: rows [c, k], padded with zeros after the last input.
        fan_in: k.
        bits: of all rows.
        group: from `effective_group`.
    """
    scales = np.asarray(array.scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    return uniform_rows(np.asarray(array.qvalue)[:, :fan_in], scales, bits, group)


def uniform_rows(
    codes: Int[np.ndarray, "c k"], scales: Float[np.ndarray, "c g"], bits: int, group: int | None
) -> QuantizedRows:
    """Rows that all have the same bits, with signed codes."""
    return QuantizedRows(
        bits=np.full(len(codes), bits),
        codes=codes.astype(np.int8),
        scales=scales,
        grid="rtn",
        group=group,
    )


def nearest(weight: Float[Array, "c k"], bits: int, group: int | None) -> QuantizedRows:
    """Round to nearest (qwix's PTQ): codes and scales of rows [c, k]."""
    group = effective_group(weight.shape[1], group)
    how = how_to_quantize(bits, group)
    with qwix_context():
        array = qwix.quantize(
            padded(weight, group),
            how.qtype,
            channelwise_axes=how.channelwise_axes,
            tiled_axes=how.tiled_axes,
            calibration_method=how.calibration_method,
        )
    return taken(array, weight.shape[1], bits, group)


def nearest_scaled(
    weight: Float[Array, "c k"],
    multiplier: Float[np.ndarray, " k"],
    bits: int,
    group: int | None,
) -> QuantizedRows:
    """Round to nearest of w / m, for inputs that will be multiplied by m.

    Args:
        weight: source rows.
        multiplier: m, positive; rounded to bfloat16, as it is stored, before it is used.
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; None: the whole row.
    """
    stored = np.asarray(multiplier).astype(ml_dtypes.bfloat16).astype(np.float32)
    rows = nearest(weight.astype(jnp.float32) / jnp.asarray(stored)[None], bits, group)
    return dataclasses.replace(rows, input_scale=stored)
