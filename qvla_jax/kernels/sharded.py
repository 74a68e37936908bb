"""Tensor parallelism: distributes the output channels of a packed weight over a mesh axis.

Every device gets the same number of channels of each bit-width, so that all run the same program
and none waits. Channels that do not divide evenly move to the next wider width with their codes and
scales if that takes fewer bytes than padding, as `kernels.tiles` does for tiles; the product does
not change. The devices' outputs are gathered and put in channel order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from qvla_jax.array_typing import AnyArray, Array, Float, Int32
from qvla_jax.errors import InputError
from qvla_jax.kernels import dispatch
from qvla_jax.kernels.codes import pack_words, unpack_words
from qvla_jax.kernels.packed import (
    REARRANGED,
    PackedWeight,
    Rearranged,
    Segment,
    kept_of,
)
from qvla_jax.kernels.tiles import Chunk, Part, plan
from qvla_jax.quantization.codes import SIGNED, SOURCE, SOURCE_CODES, CodeMap
from qvla_jax.sharding import put, to_host


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["shards", "position", "pruned_bias"],
    meta_fields=["mesh", "axis", *REARRANGED],
)
@dataclasses.dataclass(frozen=True)
class ShardedWeight(Rearranged):
    """A packed weight whose channels are on several devices; d of them, l channels on each."""

    # A backend's arrangement, every array with a leading axis d that is split over the devices.
    shards: Any
    # int32 [c]: position of a channel among the outputs of all devices, d l, and the pruned
    # channels.
    position: Int32[AnyArray, " c"]
    # [p], biases of pruned channels, ascending; float32.
    pruned_bias: Float[AnyArray, " p"]
    mesh: Mesh
    axis: str

    @property
    def implementation(self) -> str:
        """See `dispatch.PreparedWeight`."""
        return "sharded"

    @property
    def devices(self) -> int:
        """Devices that share the channels."""
        return self.mesh.shape[self.axis]


def shard(
    w: PackedWeight, mesh: Mesh, axis: str, implementation: str | None = None
) -> ShardedWeight:
    """Distributes the channels of a weight over the devices of a mesh axis and arranges each share.

    Args:
        w: canonical weight, possibly from `kernels.join`, with its arrays on the host or on a
            device.
        mesh: any shape; the weight is replicated along its other axes.
        axis: the axis of the mesh.
        implementation: runs each share; None takes the best for the platform.

    Returns:
        What `mixed_matmul` takes in place of `w`.

    Raises:
        InputError: the mesh has no such axis, or the implementation cannot run the weight here.
    """
    arranged = arrange(w, mesh, axis, implementation)
    split, every = PartitionSpec(axis), PartitionSpec()
    return dataclasses.replace(
        arranged,
        shards=jax.tree.map(lambda array: put(mesh, array, split), arranged.shards),
        position=put(mesh, arranged.position, every),
        pruned_bias=put(mesh, arranged.pruned_bias, every),
    )


def arrange(
    w: PackedWeight, mesh: Mesh, axis: str, implementation: str | None = None
) -> ShardedWeight:
    """What `shard` places, with its arrays on the host; the devices of the mesh need not be here.

    See `shard` for arguments and errors.
    """
    if axis not in mesh.shape:
        raise InputError(f"the mesh has the axes {', '.join(mesh.axis_names)}, none is {axis!r}")
    w = jax.device_get(w)
    shares, position, pruned = deal(w, mesh.shape[axis])
    stacked = None
    if w.segments:
        prepared = [dispatch.prepare(share, implementation) for share in shares]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *prepared)
    bias = np.zeros(len(pruned)) if w.bias is None else np.asarray(w.bias)[pruned]
    return ShardedWeight(
        shards=stacked,
        position=position,
        pruned_bias=bias.astype(np.float32),
        mesh=mesh,
        axis=axis,
        **kept_of(w),
    )


def matmul(x: Float[Array, "*m k"], w: ShardedWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """The product, whole on every device; x is whole on every device, too.

    Differentiable with respect to x, as the products of the shares are.
    """
    every, split = PartitionSpec(), PartitionSpec(w.axis)

    def whole(x: Array, shards: Any, position: AnyArray, pruned_bias: AnyArray) -> Array:
        parts = [jnp.broadcast_to(pruned_bias.astype(x.dtype), (*x.shape[:-1], len(pruned_bias)))]
        if shards is not None:
            own = jax.tree.map(lambda array: array[0], shards)
            y = dispatch.mixed_matmul(x, own, activation_bits)
            parts.insert(0, jax.lax.all_gather(y, w.axis, axis=y.ndim - 1, tiled=True))
        return jnp.concatenate(parts, axis=-1)[..., position]

    # Outputs of custom calls do not declare the axes over which they vary, which the check
    # requires.
    mapped = jax.shard_map(
        whole, mesh=w.mesh, in_specs=(every, split, every, every), out_specs=every, check_vma=False
    )
    return mapped(x, w.shards, w.position, w.pruned_bias)


def deal(
    w: PackedWeight, devices: int
) -> tuple[list[PackedWeight], Int32[np.ndarray, " c"], Int32[np.ndarray, " p"]]:
    """Distributes the channels of a weight on the host.

    Returns:
        The devices' weights, which have the same segments and differ only in their arrays (padding
        rows have codes 0 and scale 1); the position of each channel of `w` in the concatenated
        outputs of all devices, followed by the pruned channels; the pruned channels.
    """
    parts = plan(w.segments, devices)
    share = sum(part.tiles(devices) for part in parts)
    order = np.arange(w.shape[0]) if w.index is None else np.asarray(w.index, np.int64)
    first = np.cumsum([0, *(segment.rows for segment in w.segments)])
    pruned = np.setdiff1d(np.arange(w.shape[0]), order)
    position = np.empty(w.shape[0], np.int32)
    position[pruned] = devices * share + np.arange(len(pruned))
    bias = None if w.bias is None else np.zeros((devices, share), w.bias.dtype)
    words, scales = [], []
    start = 0  # of the part within a device's outputs
    for part in parts:
        each = part.tiles(devices)
        extra = devices * each - part.rows
        packed = np.concatenate([_words(w, chunk, part.bits) for chunk in part.chunks])
        words.append(_dealt(packed, devices, 0))
        own = np.concatenate(
            [np.asarray(w.scales[c.segment])[c.start : c.stop] for c in part.chunks]
        )
        scales.append(_dealt(own, devices, 1))
        channels = np.concatenate(
            [order[first[c.segment] + c.start : first[c.segment] + c.stop] for c in part.chunks]
        )
        device, row = np.divmod(np.arange(part.rows), each)
        position[channels] = device * share + start + row
        if bias is not None:
            kept = np.concatenate([np.asarray(w.bias)[channels], np.zeros(extra, bias.dtype)])
            bias[:, start : start + each] = kept.reshape(devices, each)
        start += each
    segments = tuple(Segment(part.bits, part.tiles(devices), _meaning(w, part)) for part in parts)
    plain = len(segments) == 1
    shares = [
        PackedWeight(
            words=tuple(array[device] for array in words),
            scales=tuple(array[device] for array in scales),
            index=None if plain else np.arange(share, dtype=np.uint16),
            bias=None if bias is None else bias[device],
            segments=segments,
            shape=(share, w.shape[1]),
            group=w.group,
            source_dtype=w.source_dtype,
        )
        for device in range(devices)
    ]
    return shares, position, pruned.astype(np.int32)


def canonical(w: ShardedWeight) -> PackedWeight:
    """The distributed weight, exactly, on the host."""
    held = jax.tree.map(to_host, w.shards)
    shares = [
        jax.device_get(dispatch.canonical(jax.tree.map(lambda array, i=device: array[i], held)))
        for device in range(w.devices if w.segments else 0)
    ]
    position = to_host(w.position)
    outputs = sum(share.shape[0] for share in shares)
    channel = np.zeros(outputs + len(w.pruned_bias), np.int64)
    channel[position] = np.arange(w.shape[0])
    by_device = channel[:outputs].reshape(w.devices, -1)
    found: dict[Chunk, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    start = 0
    for number, part in enumerate(plan(w.segments, w.devices)):
        stop = start + part.tiles(w.devices)
        words = np.concatenate([share.words[number] for share in shares])
        scales = np.concatenate([share.scales[number] for share in shares])
        channels = by_device[:, start:stop].reshape(-1)
        start, row = stop, 0
        for chunk in part.chunks:
            here = slice(row, row + chunk.rows)
            row += chunk.rows
            own = words[here]
            segment = w.segments[chunk.segment]
            if segment.bits != part.bits:
                own = _recoded(own, w.shape[1], part.bits, SIGNED[part.bits], segment)
            found[chunk] = own, scales[here], channels[here]
    chunks = sorted(found, key=lambda chunk: (chunk.segment, chunk.start))
    of_segment = [[found[c] for c in chunks if c.segment == s] for s in range(len(w.segments))]
    index = np.concatenate([np.zeros(0, np.int64), *(found[chunk][2] for chunk in chunks)])
    bias = None
    if w.bias_dtype is not None:
        stored = [np.asarray(share.bias).astype(np.float32) for share in shares]
        bias = np.concatenate([*stored, to_host(w.pruned_bias)])[position]
    return w.restored(
        words=(np.concatenate([piece[0] for piece in pieces]) for pieces in of_segment),
        scales=(np.concatenate([piece[1] for piece in pieces]) for pieces in of_segment),
        index=index,
        bias=bias,
    )


def _dealt(rows: np.ndarray, devices: int, padding: float) -> np.ndarray:
    """Rows [n, ...] -> [devices, ceil(n / devices), ...], padded."""
    extra = -len(rows) % devices
    filler = np.full((extra, *rows.shape[1:]), padding, rows.dtype)
    return np.stack(np.split(np.concatenate([rows, filler]), devices))


def _words(w: PackedWeight, chunk: Chunk, bits: int) -> np.ndarray:
    """Canonical words of the rows of a chunk at a width that holds them."""
    segment = w.segments[chunk.segment]
    words = np.asarray(w.words[chunk.segment])[chunk.start : chunk.stop]
    if segment.bits == bits:
        return words
    wide = Segment(bits, chunk.rows, SIGNED[bits])
    return _recoded(words, w.shape[1], segment.bits, segment.code_map, wide)


def _recoded(words: np.ndarray, k: int, bits: int, meaning: CodeMap, target: Segment) -> np.ndarray:
    """Words whose codes stand for the same integers in another segment's map."""
    q = unpack_words(words, bits, k).astype(np.int32) * meaning.multiplier + meaning.offset
    u = (q - target.code_map.offset) // target.code_map.multiplier
    return np.asarray(pack_words(u.astype(np.uint8), target.bits))


def _meaning(w: PackedWeight, part: Part) -> CodeMap:
    if part.bits == SOURCE:
        return SOURCE_CODES
    own = [w.segments[chunk.segment] for chunk in part.chunks]
    # Nothing moves to the narrowest width, whose codes may be odd.
    return own[0].code_map if own[0].bits == part.bits else SIGNED[part.bits]
