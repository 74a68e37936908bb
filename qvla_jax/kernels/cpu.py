"""The CPU kernel: an XLA custom call in C++ (csrc/), with a path for each instruction set.

Weights are arranged in tiles of 16 output channels, as csrc/kernel.h describes them; 3-bit codes
are held in 4 bits, float16 and float32 rows in float32, and rows and inputs are padded to whole
tiles and blocks, so a prepared weight takes somewhat more than the file. Outputs are stored through
the index by the kernel itself.

bfloat16 activations are multiplied unchanged. float32 activations are split into the sum of two
bfloat16 numbers on paths that multiply those (about 2^-17 relative error), and stay in float32
elsewhere. Intel's processors multiply float32 numbers faster than pairs of bfloat16 numbers, so
there they stay in float32.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import mmap
import os
import warnings
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float
from qvla_jax.kernels.codes import (
    array_module,
    held_bits,
    num_words,
    pack_words,
    unpack_words,
)
from qvla_jax.kernels.packed import (
    REARRANGED,
    SOURCE_DTYPES,
    PackedWeight,
    Rearranged,
    Segment,
    kept_of,
    source_values,
    source_words,
)
from qvla_jax.quantization.codes import SIGNED, SOURCE, CodeMap

_TARGET: Final = "qvla_matmul"
ATTENTION: Final = "qvla_attention"  # see kernels/cpu_attention.py
_LANES: Final = 16
# k is padded to a multiple: a block of 2-bit codes.
_INPUTS: Final = 16
# Bits of tiles that hold float32 numbers: rows of 16 bits whose source is not bfloat16.
_WIDE: Final = 32
_HUGE_PAGE: Final = 2**21


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "bias", "index", "pruned", "pruned_bias"],
    meta_fields=[*REARRANGED],
)
@dataclasses.dataclass(frozen=True)
class CpuWeight(Rearranged):
    """A packed weight in tiles; T of them in all segments, G scales a row."""

    words: AnyArray  # uint8, tile after tile
    scales: AnyArray  # float32 [T G 16]
    bias: AnyArray  # float32 [T 16], of the stored rows
    index: AnyArray  # int32 [T 16], output channel of a row; -1: padding
    pruned: AnyArray  # int32, channels without a row ...
    pruned_bias: AnyArray  # ... and float32, their biases

    @property
    def implementation(self) -> str:
        """See `dispatch.PreparedWeight`."""
        return "cpu"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, registered with XLA; None, with one warning, if there is none.

    The environment variable QVLA_CPU_LIBRARY selects another library than the package's.
    """
    # An editable installation keeps it outside the sources, where an import finds it.
    spec = importlib.util.find_spec("qvla_jax.kernels._cpu")
    path = Path(__file__).with_name("_cpu.so") if spec is None else Path(spec.origin or "")
    path = Path(os.environ.get("QVLA_CPU_LIBRARY") or path)
    try:
        loaded = ctypes.CDLL(str(path))
        targets = {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in (_TARGET, ATTENTION)}
    except (OSError, AttributeError) as error:  # no library, or one of an older version
        warnings.warn(
            "qvla_jax was installed without its CPU kernel, so packed weights run through the slow "
            "reference product; install a C++ compiler (such as g++) and qvla_jax again "
            f"({error})",
            stacklevel=2,
        )
        return None
    for name, target in targets.items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    loaded.qvla_kernel_name.restype = ctypes.c_char_p
    return loaded


def instruction_set() -> str | None:
    """The path that runs here, as csrc/select.cpp names it; None without a compiled kernel.

    On x86-64 "avx512_bf16" (with VNNI and BF16), "avx512" (with VNNI), "avx2_vnni" (with AVX-VNNI),
    "avx2" or "portable"; on 64-bit ARM "neon_bf16" (with SDOT and BFDOT), "neon_dot" (with SDOT),
    "neon" or "portable". The environment variable QVLA_CPU_KERNEL selects another path that the
    processor supports.
    """
    loaded = library()
    return None if loaded is None else loaded.qvla_kernel_name().decode()


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    if library() is None:
        return "the package was installed without its CPU kernel"
    del w
    return None


def prepare(w: PackedWeight) -> CpuWeight:
    """Arranges a weight in tiles; numpy arrays stay numpy arrays, and words get their own memory.

    `jax.device_put` does not move them; `jnp.asarray` would copy them to smaller pages.
    """
    xp, c = array_module(*jax.tree.leaves(w)), w.shape[0]
    groups = w.num_groups
    bias = xp.zeros(c, np.float32) if w.bias is None else xp.asarray(w.bias).astype(np.float32)
    rows = sum(segment.rows for segment in w.segments)
    index = xp.arange(c) if w.index is None else xp.asarray(w.index)
    index = index.astype(np.int32)
    words, scales, biases, indices = [], [], [], []
    start = 0
    for segment, packed, own in zip(w.segments, w.words, w.scales, strict=True):
        part = index[start : start + segment.rows]
        start += segment.rows
        extra = -segment.rows % _LANES
        words.append(_tiles(segment, packed, w.shape[1], extra, w.source_dtype))
        own = xp.ones((segment.rows, groups)) if segment.bits == SOURCE else xp.asarray(own)
        padded = xp.pad(own.astype(np.float32), ((0, extra), (0, 0)))
        scales.append(padded.reshape(-1, _LANES, groups).transpose(0, 2, 1).reshape(-1))
        biases.append(xp.pad(bias[part], (0, extra)))
        indices.append(xp.pad(part, (0, extra), constant_values=-1))
    present = _mark(xp, index, c)
    if xp is jnp:
        (pruned,) = jnp.nonzero(~present, size=c - rows)
    else:
        pruned = np.flatnonzero(~present)
    return CpuWeight(
        words=_joined(xp, words, np.uint8) if xp is jnp else _in_huge_pages(words),
        scales=_joined(xp, scales, np.float32),
        bias=_joined(xp, biases, np.float32),
        index=_joined(xp, indices, np.int32),
        pruned=pruned.astype(np.int32),
        pruned_bias=bias[pruned],
        **kept_of(w),
    )


def canonical(w: CpuWeight) -> PackedWeight:
    """The inverse of `prepare`, exactly."""
    xp, k = array_module(*jax.tree.leaves(w)), w.shape[1]
    groups = w.num_groups
    words, scales, indices, kept = [], [], [], []
    byte = tile = 0
    for segment in w.segments:
        tiles = -(-segment.rows // _LANES)
        size = tiles * _tile_bytes(segment, k, w.source_dtype)
        words.append(_untiled(segment, w.words[byte : byte + size], k, w.source_dtype))
        part = w.scales[tile * groups * _LANES : (tile + tiles) * groups * _LANES]
        part = part.reshape(tiles, groups, _LANES).transpose(0, 2, 1).reshape(-1, groups)
        part = part[: segment.rows].astype(ml_dtypes.bfloat16)
        scales.append(part[:, :0] if segment.bits == SOURCE else part)
        lanes = slice(tile * _LANES, tile * _LANES + segment.rows)
        indices.append(w.index[lanes])
        kept.append(w.bias[lanes])
        byte, tile = byte + size, tile + tiles
    index = _joined(xp, indices, np.int32)
    bias = None
    if w.bias_dtype is not None:
        where = xp.concatenate([index, w.pruned])
        values = xp.concatenate([*kept, w.pruned_bias])
        # `where` holds every channel once.
        bias = values[xp.argsort(where)]
    return w.restored(words=words, scales=scales, index=index, bias=bias)


def matmul(
    x: Float[Array, "*m k"], w: CpuWeight, activation_bits: int, *, max_threads: int = 0
) -> Float[Array, "*m c"]:
    """The product; any number of threads gives the same bits.

    Args:
        x: bfloat16 or float32.
        w: from `prepare`.
        activation_bits: 16, 8 or 4.
        max_threads: threads of XLA's pool to use; 0 uses all.
    """
    library()  # registers the call
    c, k = w.shape
    flat = x.reshape(-1, k)
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((flat.shape[0], c), x.dtype),
        vmap_method="expand_dims",
    )
    segments = [
        (_stored_bits(s, w.source_dtype), *_stored_map(s), -(-s.rows // _LANES)) for s in w.segments
    ]
    y = call(
        flat, w.words, w.scales, w.bias, w.index, w.pruned, w.pruned_bias,
        segments=np.asarray(segments, np.int64).reshape(-1),
        group=np.int64(w.group or 0),
        activation_bits=np.int64(activation_bits),
        max_threads=np.int64(max_threads),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], c)


def _stored_bits(segment: Segment, source_dtype: str) -> int:
    if segment.bits == SOURCE:
        return SOURCE if source_dtype == "bfloat16" else _WIDE
    return held_bits(segment.bits)


def _stored_map(segment: Segment) -> CodeMap:
    """3-bit codes u become u + 4, which stand for the same integers in the map of 4 bits."""
    held = held_bits(segment.bits)
    return segment.code_map if held == segment.bits else SIGNED[held]


def _tile_bytes(segment: Segment, k: int, source_dtype: str) -> int:
    return -(-k // _INPUTS) * _INPUTS * _LANES * _stored_bits(segment, source_dtype) // 8


def _tiles(
    segment: Segment, words: AnyArray, k: int, extra_rows: int, source_dtype: str
) -> AnyArray:
    """Canonical words of a segment -> bytes of its tiles."""
    xp, bits = array_module(words), _stored_bits(segment, source_dtype)
    if bits == _WIDE:
        numbers = xp.pad(
            source_values(words, k, source_dtype), ((0, extra_rows), (0, -k % _INPUTS))
        )
        return _bytes_of(numbers.reshape(-1, _LANES, numbers.shape[1]).transpose(0, 2, 1))
    if segment.bits == 3:
        words = pack_words(unpack_words(words, 3, k) + xp.uint8(4), 4)
    extra = _tile_words(bits, k) - words.shape[1]
    words = _exchanged(xp.pad(words, ((0, extra_rows), (0, extra))), bits)
    return _bytes_of(words.reshape(-1, _LANES, words.shape[1]).transpose(0, 2, 1))


def _untiled(segment: Segment, tiles: AnyArray, k: int, source_dtype: str) -> AnyArray:
    """Inverse of `_tiles`."""
    xp, bits = array_module(tiles), _stored_bits(segment, source_dtype)
    if bits == _WIDE:
        padded = -(-k // _INPUTS) * _INPUTS
        numbers = _elements_of(tiles, np.float32).reshape(-1, padded, _LANES).transpose(0, 2, 1)
        return _source_words(numbers.reshape(-1, padded)[: segment.rows, :k], source_dtype)
    size = _tile_words(bits, k)
    words = _elements_of(tiles, np.uint32).reshape(-1, size, _LANES).transpose(0, 2, 1)
    words = _exchanged(words.reshape(-1, size)[: segment.rows], bits, inverse=True)
    words = words[:, : num_words(k, bits)]
    if segment.bits == 3:
        return pack_words(unpack_words(words, 4, k) - xp.uint8(4), 3)
    return words


def _tile_words(bits: int, k: int) -> int:
    """Words of a row in a tile."""
    return -(-k // _INPUTS) * _INPUTS * bits // 32


# Moves the codes of a canonical word, code i in bits [i b, (i + 1) b), to their places in a tile:
# bits under a mask are swapped with those a shift above them.
_EXCHANGES: Final = {
    8: (),
    4: ((0x0000FF00, 8), (0x00F000F0, 4)),
    2: ((0x0000F0F0, 12), (0x00CC00CC, 6)),
}


def _exchanged(words: AnyArray, bits: int, *, inverse: bool = False) -> AnyArray:
    """Canonical words [r, w] <-> words of tiles."""
    xp = array_module(words)
    if bits == SOURCE:  # halves (0, 1), (2, 3) <-> (0, 2), (1, 3)
        first, second = words[:, 0::2], words[:, 1::2]
        low = (first & xp.uint32(0xFFFF)) | (second << xp.uint32(16))
        high = (first >> xp.uint32(16)) | (second & xp.uint32(0xFFFF0000))
        return xp.stack([low, high], axis=2).reshape(words.shape)
    steps = _EXCHANGES[bits]
    for mask, distance in reversed(steps) if inverse else steps:
        shift = xp.uint32(distance)
        moved = ((words >> shift) ^ words) & xp.uint32(mask)
        words = words ^ moved ^ (moved << shift)
    return words


def _bytes_of(elements: AnyArray) -> AnyArray:
    """Little-endian bytes, as on every processor that has a kernel."""
    if isinstance(elements, jax.Array):
        return jax.lax.bitcast_convert_type(elements, jnp.uint8).reshape(-1)
    return np.ascontiguousarray(elements).view(np.uint8).reshape(-1)


def _elements_of(data: AnyArray, dtype: Any) -> AnyArray:
    """Inverse of `_bytes_of`."""
    if isinstance(data, jax.Array):
        return jax.lax.bitcast_convert_type(data.reshape(-1, np.dtype(dtype).itemsize), dtype)
    return np.ascontiguousarray(data).view(dtype)


def _source_words(numbers: AnyArray, source_dtype: str) -> AnyArray:
    """Words of 16-bit rows, as `packed.source_words` makes them on the host."""
    values = numbers.astype(SOURCE_DTYPES[source_dtype])
    if isinstance(values, jax.Array):
        kind = jnp.uint32 if source_dtype == "float32" else jnp.uint16
        bits = jax.lax.bitcast_convert_type(values, kind)
        return bits if source_dtype == "float32" else pack_words(bits, SOURCE)
    return source_words(values, source_dtype)


def _mark(xp: Any, index: AnyArray, c: int) -> AnyArray:
    """Which of c channels the index names."""
    if xp is jnp:
        return jnp.zeros(c, bool).at[index].set(True)
    present = np.zeros(c, bool)
    present[index] = True
    return present


def _joined(xp: Any, parts: list[Any], dtype: Any) -> AnyArray:
    return xp.concatenate([xp.zeros(0, dtype), *parts])


def _in_huge_pages(parts: list[np.ndarray]) -> np.ndarray:
    """The parts one after the other, in pages of 2 MiB where Linux provides them.

    A product of one row is limited by memory bandwidth, and prefetching stops at the end of a page.
    """
    size = sum(part.size for part in parts)
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.concatenate([np.zeros(0, np.uint8), *parts])
    # One extra page lets the words begin at a page boundary. Untouched memory costs nothing, and
    # small pages hold what does not fill a large one.
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a Linux without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE_PAGE * _HUGE_PAGE)
    return np.concatenate(parts, out=whole[start : start + size])
