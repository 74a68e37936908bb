"""Random weights, and what they should dequantize to, for the tests of all implementations."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.quantization import quantize_rows
from qvla_jax.quantization.codes import BITS, levels
from qvla_jax.quantization.rows import QuantizedRows

# Lengths around words, vector blocks and groups.
FAN_INS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 300]))
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 80]))


def random_weight(c, k, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (c, k)) * rng.lognormal(0.0, 1.0, (c, 1)) * 0.05
    return weight.astype(dtype).astype(np.float32)


def random_bits(c, seed, options=BITS):
    return np.random.default_rng(seed + 1).choice(options, c)


def pack_codes(weight, bits, codes, scales, group=None, grid="fitted", **settings):
    """Packs codes that were not found by rounding."""
    rows = QuantizedRows(bits=bits, codes=codes, scales=scales, grid=grid, group=group)
    return kernels.pack_rows(rows, weight, **settings)


def expected_rows(weight, bits, group, grid):
    """w_hat in float64, group after group with the quantizer's own codes and scales."""
    k = weight.shape[1]
    result = np.zeros(weight.shape)
    for row, width in enumerate(bits):
        if width == 16:
            result[row] = weight[row]
        elif width:
            for start in range(0, k, group or k):
                part = slice(start, min(start + (group or k), k))
                q, s = quantize_rows(weight[row : row + 1, part], int(width), grid=grid)
                result[row, part] = np.asarray(q[0], np.float64) * float(s[0, 0])
    return result


def nearest_codes(weight, bits, group, grid):
    """Codes [c, k] and scales [c, g] of every row at its own width, rounded in numpy.

    Drawn shapes would have the package's quantizer compiled anew for each width of each of them.
    """
    c, k = weight.shape
    groups = [slice(i, min(i + (group or k), k)) for i in range(0, k, group or k)]
    codes, scales = np.zeros((c, k), np.int8), np.ones((c, len(groups)), np.float32)
    for row, width in enumerate(bits):
        if width in (0, 16):
            continue
        low, high, step, offset = levels(int(width), grid)
        for number, part in enumerate(groups):
            largest = max(np.abs(weight[row, part]).max(), np.float32(2.0**-100))
            scale = np.float32(ml_dtypes.bfloat16(largest / high))
            whole = step * np.round((weight[row, part] / scale - offset) / step) + offset
            codes[row, part], scales[row, number] = np.clip(whole, low, high), scale
    return codes, scales


@st.composite
def packed_weights(draw, options=BITS, group=True):
    """(PackedWeight, w_hat f64[c, k], bias f64[c])."""
    c, k, seed = draw(CHANNELS), draw(FAN_INS), draw(st.integers(0, 2**16))
    widths = draw(st.lists(st.sampled_from(options), min_size=1, max_size=4))
    grid = draw(st.sampled_from(["fitted", "rtn"]))
    size = draw(st.sampled_from([None, 16, 32, 128])) if group else None
    source = draw(st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]))
    weight, bits = random_weight(c, k, seed, source), random_bits(c, seed, widths)
    bias = np.random.default_rng(seed + 2).normal(size=c).astype(np.float32)
    has_bias = draw(st.booleans())
    codes, scales = nearest_codes(weight, bits, size, grid)
    w = pack_codes(
        weight, bits, codes, scales, size, grid, bias=bias if has_bias else None,
        source_dtype=np.dtype(source).name,
    )  # fmt: skip
    spread = np.repeat(scales, size or k, axis=1)[:, :k].astype(np.float64)
    w_hat = np.where((bits == 16)[:, None], weight.astype(np.float64), codes * spread)
    return w, w_hat, bias.astype(np.float64) if has_bias else np.zeros(c)
