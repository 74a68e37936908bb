"""Which layers are quantized, chosen by path patterns, and the channel order that follows."""

import dataclasses
import re

import numpy as np
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.mapping import release_pages
from qvla_jax.models.surgery import named_modules
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layout import source_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRules:
    """Regular expressions on dotted layer paths, matched from the start (`re.match`).

    A layer is quantized if a pattern of `include` matches and none of `exclude` does. A pattern
    that matches nothing is an error, so a misspelled rule is never silently ignored.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()


def quantizable_layers(model: nnx.Module, rules: LayerRules) -> dict[str, nnx.Linear]:
    """Linear layers that the rules choose, by path, in the model's order.

    A policy's own rules are those of its layout, `policy.layout.rules`.

    Raises:
        InputError: a pattern matches no linear layer, or nothing is left to quantize.
    """
    linears = named_modules(model, nnx.Linear)
    for kind in ("include", "exclude"):
        for pattern in getattr(rules, kind):
            if not any(re.match(pattern, path) for path in linears):
                raise InputError(
                    f"layer rules: the {kind} pattern {pattern!r} matches none of the "
                    f"{len(linears)} linear layers, such as {next(iter(linears), 'none')!r}"
                )
    chosen = {
        path: linear
        for path, linear in linears.items()
        if any(re.match(p, path) for p in rules.include)
        and not any(re.match(p, path) for p in rules.exclude)
    }
    if not chosen:
        raise InputError("layer rules: every included layer is excluded; nothing to quantize")
    return chosen


def weight_rows(linear: nnx.Linear) -> np.ndarray:
    """The layer's weight as rows [c, k] on the host, in its own dtype."""
    return np.asarray(linear.kernel[...]).T


def channel_index(layers: dict[str, nnx.Linear]) -> ChannelIndex:
    """The order of channels over these layers.

    Raises:
        InputError: a weight is NaN or infinite; the message names layer and channel.
    """
    for path, linear in layers.items():
        check_finite(path, weight_rows(linear))
        release_pages(linear.kernel.get_value())
    return ChannelIndex(tuple(layer_info(path, linear) for path, linear in layers.items()))


def layer_info(path: str, linear: nnx.Linear) -> LayerInfo:
    """A layer's entry in a channel index."""
    rows = weight_rows(linear)
    arrays = [rows] if linear.bias is None else [rows, np.asarray(linear.bias[...])]
    return LayerInfo(
        path=path,
        out_features=rows.shape[0],
        fan_in=rows.shape[1],
        has_bias=linear.bias is not None,
        source_bytes=max(source_bytes(array) for array in arrays),
    )


def check_finite(path: str, rows: np.ndarray) -> None:
    """Raises an `InputError` naming the first channel with a weight that is not finite."""
    finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
    if not finite.all():
        channel = int(np.flatnonzero(~finite)[0])
        kind = "NaN" if np.isnan(rows[channel].astype(np.float32)).any() else "infinite"
        raise InputError(
            f"{path}: the weights of output channel {channel} hold {kind} values "
            f"({int((~finite).sum())} such channels in this layer); nothing was quantized"
        )
