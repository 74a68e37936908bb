"""The order of channels: which row of a table belongs to which output channel of which layer."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Final

import numpy as np

from qvla_jax.array_typing import Int
from qvla_jax.errors import InputError

MAX_CHANNELS: Final = 1 << 16
# Beyond any layer; sums of weights stay exact in 64 bits.
_MAX_FAN_IN: Final = 1 << 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One quantized layer.

    Invariants: all counts are positive; `path` is unique within a `ChannelIndex`.
    """

    # Dotted path of the public checkpoint, "language_model.model.layers.0.mlp.up_proj".
    path: str
    out_features: int
    fan_in: int
    # The source layer has a bias of its own.
    has_bias: bool
    # Bytes of one weight of the source, kept by 16-bit channels and by biases.
    source_bytes: int = 2

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return self.out_features * self.fan_in


@dataclasses.dataclass(frozen=True)
class ChannelIndex:
    """Channels of all quantized layers, layer after layer, C in all."""

    layers: tuple[LayerInfo, ...]

    def __post_init__(self) -> None:
        if len({layer.path for layer in self.layers}) != len(self.layers):
            raise InputError("a layer's path occurs twice in the channel index")
        for layer in self.layers:
            sizes = (layer.out_features, layer.fan_in, layer.source_bytes)
            if not all(isinstance(n, int | np.integer) for n in sizes) or min(sizes) < 1:
                raise InputError(f"{layer.path}: sizes must be positive integers, got {layer}")
            if layer.fan_in > _MAX_FAN_IN or layer.source_bytes > 8:
                raise InputError(f"{layer.path}: no layer is as large as {layer}")
            if layer.out_features > MAX_CHANNELS:
                raise InputError(
                    f"{layer.path}: {layer.out_features} output channels; the packed layout's "
                    f"16-bit index serves {MAX_CHANNELS}: exclude this layer"
                )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @functools.cached_property
    def offsets(self) -> Int[np.ndarray, " L+1"]:
        """First row of each layer, and C at the end."""
        counts = [layer.out_features for layer in self.layers]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @functools.cached_property
    def layer_of(self) -> Int[np.ndarray, " C"]:
        """Number of the layer that each row belongs to."""
        counts = [layer.out_features for layer in self.layers]
        return np.repeat(np.arange(len(self.layers), dtype=np.int32), counts)

    @functools.cached_property
    def channel(self) -> Int[np.ndarray, " C"]:
        """Output channel within its layer."""
        return (np.arange(len(self)) - self.offsets[self.layer_of]).astype(np.int32)

    @functools.cached_property
    def fan_in(self) -> Int[np.ndarray, " C"]:
        """Weights of each channel."""
        return np.asarray([layer.fan_in for layer in self.layers], np.int64)[self.layer_of]

    @property
    def paths(self) -> tuple[str, ...]:
        """Layer paths in order."""
        return tuple(layer.path for layer in self.layers)

    @property
    def num_weights(self) -> int:
        """Weights of all channels."""
        return sum(layer.num_weights for layer in self.layers)

    def items(self) -> Iterator[tuple[LayerInfo, slice]]:
        """Each layer with its rows."""
        for number, layer in enumerate(self.layers):
            yield layer, slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def name(self, row: int) -> str:
        """`path[channel]` of a row, for messages."""
        return f"{self.layers[self.layer_of[row]].path}[{self.channel[row]}]"

    def check_bits(self, bits: np.ndarray, options: tuple[int, ...]) -> Int[np.ndarray, " C"]:
        """Validates bits in channel order and returns them as int64.

        Raises:
            InputError: wrong length or type, or a bit-width that is no option.
        """
        bits = np.asarray(bits)
        if bits.shape != (len(self),) or not np.issubdtype(bits.dtype, np.integer):
            raise InputError(
                f"bits: expected {len(self)} integers, one for each channel in the table's order, "
                f"got {bits.dtype}{list(bits.shape)}"
            )
        bad = np.flatnonzero(~np.isin(bits, options))
        if bad.size:
            raise InputError(
                f"bits: {self.name(bad[0])} has {bits[bad[0]]}, and {bad.size - 1} more channels "
                f"have none of {options}"
            )
        return bits.astype(np.int64)

    def average_bits(self, bits: np.ndarray) -> float:
        """Mean bit-width, each channel weighted by its weights; storage overhead not counted."""
        return float(np.sum(np.asarray(bits) * self.fan_in) / self.num_weights)
