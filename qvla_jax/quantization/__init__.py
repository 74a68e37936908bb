"""Quantizer grids, rounding, and the bytes they store: one layer's rows at a time."""

from qvla_jax.quantization.allocation import Allocation
from qvla_jax.quantization.codes import BITS
from qvla_jax.quantization.grid import dequantize_rows, quantize_rows
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import LayerRules, quantizable_layers
from qvla_jax.quantization.layout import option_sizes, row_bytes, stored_bytes, uniform_bytes
from qvla_jax.quantization.quantizer import NEAREST_UNCORRECTED, Quantizer, QuantizerSettings
from qvla_jax.quantization.statistics import InputStatistics

__all__ = [
    "BITS",
    "NEAREST_UNCORRECTED",
    "Allocation",
    "ChannelIndex",
    "InputStatistics",
    "LayerInfo",
    "LayerRules",
    "Quantizer",
    "QuantizerSettings",
    "dequantize_rows",
    "option_sizes",
    "quantizable_layers",
    "quantize_rows",
    "row_bytes",
    "stored_bytes",
    "uniform_bytes",
]
