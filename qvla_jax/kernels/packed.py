"""`PackedWeight`: a weight matrix in the canonical order of docs/mathematics.md section 6.

Files hold it, and every backend starts from it. Backends rearrange it once
(`qvla_jax.kernels.prepare`); its own order serves only to be canonical.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float
from qvla_jax.errors import InputError
from qvla_jax.kernels.codes import array_module, num_words, unpack_words
from qvla_jax.quantization.codes import SOURCE, SOURCE_CODES, CodeMap, maps_of

# Segments follow one another in this order.
WIDTHS: Final = (16, 8, 4, 3, 2)
# Groups begin at whole words at every width but 3, and at whole vector blocks of every backend.
GROUP_MULTIPLE: Final = 16
SOURCE_DTYPES: Final[dict[str, Any]] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of one bit-width. `code_map` says what codes stand for; it is (1, 0) at 16 bits."""

    bits: int
    rows: int
    code_map: CodeMap = SOURCE_CODES


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "index", "bias"],
    meta_fields=["segments", "shape", "group", "source_dtype"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Rows of a weight matrix [c, k], sorted by bit-width and packed along k.

    Row r of the concatenated segments is output channel `index[r]`; channels that the index does
    not list are pruned, their output is their bias. With codes u of segment s,

        w_hat[index[r], i] = scales[s][r, i // group] (multiplier u[r, i] + offset),

    and 16-bit rows hold the source's own numbers. A JAX pytree: arrays are leaves, everything else
    is static. Arrays are numpy or JAX arrays.

    Invariants (see `validate`): segments come in the order of `WIDTHS`, none is empty; words[s] is
    uint32[rows, ceil(k bits / 32)] with zeros after the last code; a 16-bit row has the bits of
    `source_dtype`; scales[s] is bfloat16[rows, ceil(k / group)], positive and finite, and has no
    column at 16 bits; index is uint16[rows of all segments] without repetition and ascending within
    a segment, or None if the only segment holds all channels in order.
    """

    words: tuple[AnyArray, ...]
    scales: tuple[AnyArray, ...]
    index: AnyArray | None
    # [c], in the source dtype or float32.
    bias: AnyArray | None
    segments: tuple[Segment, ...]
    # (c, k), pruned channels included.
    shape: tuple[int, int]
    # Inputs that share a scale; None: the whole row.
    group: int | None = None
    # Dtype of 16-bit rows: "bfloat16", "float16" or "float32".
    source_dtype: str = "bfloat16"

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return _num_groups(self.shape, self.group)

    @property
    def nbytes(self) -> int:
        """Stored bytes: those of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def bits(self) -> np.ndarray:
        """Bit-width of every output channel, int64 [c]; 0 for pruned ones."""
        widths = np.repeat([s.bits for s in self.segments], [s.rows for s in self.segments])
        bits = np.zeros(self.shape[0], np.int64)
        bits[np.arange(self.shape[0]) if self.index is None else np.asarray(self.index)] = widths
        return bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rearranged:
    """The static fields of the `PackedWeight` that a backend's arrangement keeps.

    All of it is static; `REARRANGED` names it for `jax.tree_util.register_dataclass`.
    """

    segments: tuple[Segment, ...]
    shape: tuple[int, int]
    group: int | None
    source_dtype: str
    # None: without bias.
    bias_dtype: str | None
    has_index: bool

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return _num_groups(self.shape, self.group)

    def restored(
        self,
        *,
        words: Iterable[AnyArray],
        scales: Iterable[AnyArray],
        index: AnyArray,
        bias: AnyArray | None,
    ) -> PackedWeight:
        """The canonical weight again.

        Args:
            words: of each segment.
            scales: of each segment.
            index: output channel of each row, of any integer type; dropped where there was none.
            bias: of each channel, in float32; dropped where there was none.
        """
        return PackedWeight(
            words=tuple(words),
            scales=tuple(scales),
            index=index.astype(np.uint16) if self.has_index else None,
            bias=None
            if bias is None or self.bias_dtype is None
            else bias.astype(SOURCE_DTYPES[self.bias_dtype]),
            segments=self.segments,
            shape=self.shape,
            group=self.group,
            source_dtype=self.source_dtype,
        )


REARRANGED: Final = tuple(field.name for field in dataclasses.fields(Rearranged))


def kept_of(w: PackedWeight) -> dict[str, Any]:
    """The fields of `Rearranged` for an arrangement of `w`."""
    return {
        "segments": w.segments,
        "shape": w.shape,
        "group": w.group,
        "source_dtype": w.source_dtype,
        "bias_dtype": None if w.bias is None else np.dtype(w.bias.dtype).name,
        "has_index": w.index is not None,
    }


def _num_groups(shape: tuple[int, int], group: int | None) -> int:
    return 1 if group is None else -(-shape[1] // group)


def segment_rows(w: PackedWeight, number: int) -> AnyArray | slice:
    """Output channels of a segment, for indexing."""
    if w.index is None:
        return slice(None)
    start = sum(segment.rows for segment in w.segments[:number])
    return w.index[start : start + w.segments[number].rows]


def segment_values(w: PackedWeight, number: int) -> Float[AnyArray, "r k"]:
    """w_hat of a segment's rows in float32."""
    segment, words = w.segments[number], w.words[number]
    xp, k = array_module(words), w.shape[1]
    if segment.bits == SOURCE:
        return source_values(words, k, w.source_dtype)
    codes = unpack_words(words, segment.bits, k).astype(xp.float32)
    multiplier, offset = (xp.float32(v) for v in segment.code_map)
    scales = w.scales[number].astype(xp.float32)
    if w.group is not None:
        scales = xp.repeat(scales, w.group, axis=1)[:, :k]
    return (codes * multiplier + offset) * scales


def source_values(words: AnyArray, k: int, source_dtype: str) -> Float[AnyArray, "r k"]:
    """The numbers of 16-bit rows in float32."""
    xp = array_module(words)
    dtype = SOURCE_DTYPES[source_dtype]
    bits = words if source_dtype == "float32" else unpack_words(words, 16, k)
    if xp is jnp:
        return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)
    return np.ascontiguousarray(bits).view(dtype).astype(np.float32)


def source_words(rows: np.ndarray, source_dtype: str) -> np.ndarray:
    """Rows in the source dtype [r, k] -> whole uint32 words."""
    values = np.ascontiguousarray(rows.astype(SOURCE_DTYPES[source_dtype]))
    if source_dtype == "float32":
        return values.view(np.uint32)
    padded = np.pad(values.view(np.uint16), ((0, 0), (0, values.shape[1] % 2)))
    return np.ascontiguousarray(padded).view(np.uint32)


def stored_rows(w: PackedWeight) -> Float[Array, "r k"]:
    """w_hat of the rows of all segments in float32, in the order of the index.

    One elementwise expression for all widths, because every layer of a traced model holds it and
    compile time matters: bit i b of a row's stream is in word i b // 32.
    """
    k = w.shape[1]
    source = 8 * np.dtype(SOURCE_DTYPES[w.source_dtype]).itemsize
    bits = [source if segment.bits == SOURCE else segment.bits for segment in w.segments]
    sizes = [num_words(k, b) for b in bits]
    rows = [segment.rows for segment in w.segments]

    def column(values: Any, dtype: Any = np.uint32) -> np.ndarray:
        return np.repeat(np.asarray(values, dtype), rows)[:, None]

    words = jnp.concatenate([jnp.asarray(part).reshape(-1) for part in w.words])
    width, size = column(bits), column(sizes)
    start = np.cumsum(size, axis=0, dtype=np.uint32) - size
    bit = np.arange(k, dtype=np.uint32)[None] * width
    at, shift = jnp.asarray(start) + (bit >> 5), bit & 31
    code = words[at] >> shift
    if 3 in bits:  # the only width whose codes straddle words
        rest = words[jnp.minimum(at + 1, len(words) - 1)]
        code = code | jnp.where(shift + width > 32, rest << ((32 - shift) & 31), 0)
    code = code & column([2**b - 1 for b in bits])
    multiplier, offset = (
        column([segment.code_map[i] for segment in w.segments], np.float32) for i in (0, 1)
    )
    value = (code.astype(jnp.float32) * multiplier + offset) * _row_scales(w)
    if w.segments[0].bits != SOURCE:
        return value
    kept = code if source == 32 else code.astype(jnp.uint16)
    exact = jax.lax.bitcast_convert_type(kept, SOURCE_DTYPES[w.source_dtype]).astype(jnp.float32)
    return jnp.where(column([s.bits == SOURCE for s in w.segments], bool), exact, value)


def _row_scales(w: PackedWeight) -> Float[Array, "r g"]:
    """Scales of all rows in float32, of every input if grouped; 1 for 16-bit rows."""
    scales = [
        jnp.ones((segment.rows, w.num_groups)) if segment.bits == SOURCE
        else jnp.asarray(own).astype(jnp.float32)
        for segment, own in zip(w.segments, w.scales, strict=True)
    ]  # fmt: skip
    whole = jnp.concatenate(scales)
    return whole if w.group is None else jnp.repeat(whole, w.group, axis=1)[:, : w.shape[1]]


def dequantize(w: PackedWeight) -> Float[Array, "c k"]:
    """w_hat in float32, exactly what `mixed_matmul` multiplies by; zeros for pruned channels."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(w)):
        result = jnp.zeros(w.shape, jnp.float32)
        for number in range(len(w.segments)):
            rows = segment_rows(w, number)
            result = result.at[rows].set(jnp.asarray(segment_values(w, number)))
        return result
    host = np.zeros(w.shape, np.float32)
    for number in range(len(w.segments)):
        host[segment_rows(w, number)] = segment_values(w, number)
    return jnp.asarray(host)


def validate(w: PackedWeight, *, where: str = "packed weight") -> None:
    """Checks every invariant of a packed weight whose arrays are on the host.

    Args:
        w: the weight.
        where: file and layer named in errors.

    Raises:
        InputError: an invariant is violated; the message says which.
    """
    for problem in _problems(w):
        raise InputError(f"{where}: {problem}")


def _problems(w: PackedWeight) -> Any:
    """Yields problems, in an order in which later checks can rely on earlier ones."""
    c, k = w.shape
    if c < 1 or k < 1:
        yield f"shape {w.shape} has no weights"
    if w.source_dtype not in SOURCE_DTYPES:
        yield f"source dtype {w.source_dtype!r} is none of {', '.join(SOURCE_DTYPES)}"
    if w.group is not None and (w.group < 1 or w.group % GROUP_MULTIPLE):
        yield f"group {w.group} is no positive multiple of {GROUP_MULTIPLE}"
    widths = [segment.bits for segment in w.segments]
    if [width for width in WIDTHS if width in widths] != widths:
        yield f"segments of {widths} bits are not in the order of {WIDTHS}"
    if any(segment.rows < 1 for segment in w.segments):
        yield "a segment is empty"
    if len(w.words) != len(widths) or len(w.scales) != len(widths):
        yield f"{len(widths)} segments, {len(w.words)} words and {len(w.scales)} scales"
    for segment, words, scales in zip(w.segments, w.words, w.scales, strict=True):
        yield from _segment_problems(w, segment, words, scales)
    yield from _index_problems(w)
    if w.bias is not None:
        if w.bias.shape != (c,) or w.bias.dtype not in SOURCE_DTYPES.values():
            yield f"bias is {w.bias.dtype}{list(w.bias.shape)}, expected floats of [{c}]"
        if not np.isfinite(np.asarray(w.bias).astype(np.float32)).all():
            yield "bias holds NaN or inf"


def _segment_problems(w: PackedWeight, segment: Segment, words: Any, scales: Any) -> Any:
    name, k = f"{segment.bits}-bit segment", w.shape[1]
    source = segment.bits == SOURCE
    width = 8 * np.dtype(SOURCE_DTYPES[w.source_dtype]).itemsize if source else segment.bits
    expected = (segment.rows, num_words(k, width))
    if words.shape != expected or words.dtype != np.uint32:
        yield f"{name}: words are {words.dtype}{list(words.shape)}, expected uint32{list(expected)}"
    used = (k * width - 1) % 32 + 1
    if used < 32 and (np.asarray(words)[:, -1] >> np.uint32(used)).any():
        yield f"{name}: bits behind the last code are not zero"
    expected = (segment.rows, 0 if source else w.num_groups)
    if scales.shape != expected or scales.dtype != ml_dtypes.bfloat16:
        yield f"{name}: scales are {scales.dtype}{list(scales.shape)}, not bfloat16{list(expected)}"
    values = np.asarray(scales).astype(np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        yield f"{name}: a scale is not positive and finite"
    allowed = list(maps_of(segment.bits))
    if segment.code_map not in allowed:
        yield f"{name}: codes stand for {tuple(segment.code_map)}, expected one of {allowed}"
    if source and not np.isfinite(source_values(np.asarray(words), k, w.source_dtype)).all():
        yield f"{name}: NaN or inf"


def _index_problems(w: PackedWeight) -> Any:
    c, rows = w.shape[0], sum(segment.rows for segment in w.segments)
    if w.index is None:
        if len(w.segments) != 1 or rows != c:
            yield f"no index, but {rows} rows in {len(w.segments)} segments for {c} channels"
        return
    if w.index.shape != (rows,) or w.index.dtype != np.uint16:
        yield f"index is {w.index.dtype}{list(w.index.shape)}, expected uint16[{rows}]"
    index = np.asarray(w.index).astype(np.int64)
    if len(np.unique(index)) != rows:
        yield "index names a channel twice"
    if rows and index.max() >= c:
        yield f"index names channel {index.max()} of {c}"
    start = 0
    for segment in w.segments:
        if (np.diff(index[start : start + segment.rows]) <= 0).any():
            yield f"{segment.bits}-bit segment: channels are not in ascending order"
        start += segment.rows
