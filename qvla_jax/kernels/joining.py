"""Several packed weights as one, with concatenated outputs.

Layers with the same input then run in one call, which reads and rounds the input once.
"""

from collections.abc import Sequence

import jax
import numpy as np

from qvla_jax.array_typing import AnyArray
from qvla_jax.errors import InputError
from qvla_jax.kernels.packed import WIDTHS, PackedWeight, Segment
from qvla_jax.quantization.index import MAX_CHANNELS


def cannot_join(weights: Sequence[PackedWeight]) -> str | None:
    """Why `join` refuses the weights; None if it does not."""
    for what, values in (
        ("fan-ins", {w.shape[1] for w in weights}),
        ("groups", {w.group for w in weights}),
        ("source dtypes", {w.source_dtype for w in weights}),
        ("biases", {None if w.bias is None else w.bias.dtype for w in weights}),
    ):
        if len(values) > 1:
            return f"their {what} differ: {', '.join(sorted(map(str, values)))}"
    meanings = {segment.bits: segment.code_map for w in weights for segment in w.segments}
    if any(s.code_map != meanings[s.bits] for w in weights for s in w.segments):
        return "codes of one bit-width stand for different integers"
    channels = sum(w.shape[0] for w in weights)
    if channels > MAX_CHANNELS:
        return f"{channels} output channels; the 16-bit index serves {MAX_CHANNELS}"
    return None


def join(weights: Sequence[PackedWeight]) -> PackedWeight:
    """The weight whose outputs are those of all weights, in turn; arrays are on the host.

    Raises:
        InputError: `cannot_join` has a reason.
    """
    if reason := cannot_join(weights):
        raise InputError(f"these weights do not join: {reason}")
    first = np.cumsum([0, *(w.shape[0] for w in weights)])
    words, scales, index, segments = [], [], [], []
    for bits in WIDTHS:
        found = [
            (w, number, int(start))
            for w, start in zip(weights, first, strict=False)
            for number, segment in enumerate(w.segments)
            if segment.bits == bits
        ]
        if not found:
            continue
        words.append(np.concatenate([np.asarray(w.words[n]) for w, n, _ in found]))
        scales.append(np.concatenate([np.asarray(w.scales[n]) for w, n, _ in found]))
        index += [_channels(w, n) + start for w, n, start in found]
        w, number, _ = found[0]
        segments.append(Segment(bits, len(words[-1]), w.segments[number].code_map))
    plain = len(segments) == 1 and all(w.index is None for w in weights)
    biases = [np.asarray(w.bias) for w in weights if w.bias is not None]
    joined = np.concatenate([np.zeros(0, np.int64), *index]).astype(np.uint16)
    return PackedWeight(
        words=tuple(words),
        scales=tuple(scales),
        index=None if plain else joined,
        bias=np.concatenate(biases) if biases else None,
        segments=tuple(segments),
        shape=(int(first[-1]), weights[0].shape[1]),
        group=weights[0].group,
        source_dtype=weights[0].source_dtype,
    )


def part(joined: PackedWeight, start: int, stop: int, *, index: bool = True) -> PackedWeight:
    """The weight of the output channels [start, stop), on the host: the inverse of `join`.

    Args:
        joined: from `join`.
        start: first output channel.
        stop: end, exclusive.
        index: whether the part has an index; it may only be left out for one width without pruned
            channels.
    """
    joined = jax.device_get(joined)
    words, scales, channels, segments = [], [], [], []
    for number, segment in enumerate(joined.segments):
        own = _channels(joined, number)
        low, high = np.searchsorted(own, [start, stop])
        if low == high:
            continue
        words.append(joined.words[number][low:high])
        scales.append(joined.scales[number][low:high])
        channels.append(own[low:high] - start)
        segments.append(Segment(segment.bits, int(high - low), segment.code_map))
    return PackedWeight(
        words=tuple(words),
        scales=tuple(scales),
        index=np.concatenate([np.zeros(0, np.int64), *channels]).astype(np.uint16)
        if index
        else None,
        bias=None if joined.bias is None else joined.bias[start:stop],
        segments=tuple(segments),
        shape=(stop - start, joined.shape[1]),
        group=joined.group,
        source_dtype=joined.source_dtype,
    )


def _channels(w: PackedWeight, number: int) -> AnyArray:
    """Output channels of a segment, int64."""
    if w.index is None:
        return np.arange(w.shape[0])
    start = sum(segment.rows for segment in w.segments[:number])
    return np.asarray(w.index, np.int64)[start : start + w.segments[number].rows]
