"""HBVLA's binarization in the Haar domain (arXiv 2602.13710), from its outline.

No code of HBVLA is public. This follows its abstract and others' summaries of the paper, with
details from the released code of HBLLM (arXiv 2512.00862), whose terms it shares, where those name
none:

1. *Salient columns* of a layer are those of largest ||w_i||^2 / [H^-1]_ii (Optimal Brain Surgeon),
   H being the action-weighted second moment of the inputs. They are 8 % of the columns: HBVLA
   states 1.08 bits, and here only salient weights have a second bit.
2. *Other columns* are paired greedily, the two of smallest distance first, and every pair (a, b)
   becomes its low band (a + b) / sqrt 2 and its high band (a - b) / sqrt 2.
3. *Binarization.* The coefficients v of a row and band form two groups of small and of large
   |v - m|, m being their mean, which both share; each group has a scale s, and v_hat = m + s
   sign(v - m). The split is the one of least squared error.
4. *Salient weights* take the Haar transform along the column, and are binarized twice, the second
   time their residual.

Unknown are HBVLA's token weights, its groups, its number of salient columns, and whether it feeds
rounding errors back; nothing is fed back here. Nothing here packs rows in the Haar domain, so the
file keeps the values in 16 bits; its header says what the codes would take.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from qvla_jax.array_typing import Float, Int
from qvla_jax.inference.policy import Policy
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.packing import packed_policy
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.layers import quantizable_layers, weight_rows
from qvla_jax.quantization.rows import QuantizedRows

BITS: Final = 1
_SALIENT: Final = 0.08
_DAMPING: Final = 0.01
_NUMBER_BITS: Final = 16  # of a mean, a scale, or a place in the order of columns


class Binarized(NamedTuple):
    """Rows in the Haar domain, back in their own."""

    values: Float[np.ndarray, "c k"]
    # Stored bits: codes alone, as papers count them; and with groups, means, scales and order.
    code_bits: int
    all_bits: int


def binarized(rows: Float[np.ndarray, "c n"]) -> Float[np.ndarray, "c n"]:
    """Each row on four numbers, m - s_2, m - s_1, m + s_1 and m + s_2, with the best split.

    With a = |v - m| in order, a split into two groups leaves the squared error sum a^2 - S_1^2 /
    n_1 - S_2^2 / n_2 with their sums S and sizes n, so all splits cost one sort.
    """
    count = rows.shape[1]
    mean = rows.mean(axis=1, keepdims=True)
    size = np.abs(rows - mean)
    in_order = np.sort(size, axis=1)
    sums = np.cumsum(in_order, axis=1)
    first = np.arange(1, count + 1)
    rest = np.maximum(count - first, 1)
    gain = sums**2 / first + (sums[:, -1:] - sums) ** 2 / rest
    split = np.argmax(gain, axis=1)[:, None]
    least = np.take_along_axis(sums, split, axis=1)
    is_small = size <= np.take_along_axis(in_order, split, axis=1)
    scale = np.where(is_small, least / first[split], (sums[:, -1:] - least) / rest[split])
    return mean + np.where(rows >= mean, scale, -scale)


def pairs(columns: Float[np.ndarray, "c n"]) -> Int[np.ndarray, "m 2"]:
    """Columns in pairs, greedily by distance; n is even."""
    count = columns.shape[1]
    squares = np.sum(columns**2, axis=0)
    distance = squares[:, None] + squares[None] - 2 * columns.T @ columns
    upper = np.triu_indices(count, 1)
    free, found = np.ones(count, bool), []
    for at in np.argsort(distance[upper], kind="stable"):
        a, b = upper[0][at], upper[1][at]
        if free[a] and free[b]:
            free[a] = free[b] = False
            found.append((a, b))
            if 2 * len(found) == count:
                break
    return np.asarray(found, np.int64).reshape(-1, 2)


def haar(values: Float[np.ndarray, "2 ..."]) -> Float[np.ndarray, "2 ..."]:
    """Low and high band of pairs; its own inverse."""
    return np.stack([values[0] + values[1], values[0] - values[1]]) / np.sqrt(2)


def hbvla(weight: Float[np.ndarray, "c k"], hessian: Float[np.ndarray, "k k"]) -> Binarized:
    """Binarizes rows [c, k].

    Args:
        weight: float64 rows.
        hessian: second moment of their inputs; zeros for a layer that no action depends on.
    """
    c, k = weight.shape
    level = float(np.mean(np.diagonal(hessian))) or 1.0
    inverse = np.linalg.inv(hessian / level + _DAMPING * np.eye(k))
    score = np.sum(weight**2, axis=0) / np.diagonal(inverse)
    salient = min(round(_SALIENT * k), k)
    salient += (k - salient) % 2
    order = np.argsort(-score, kind="stable")
    chosen, others = order[:salient], np.sort(order[salient:])
    values = np.empty_like(weight)
    both = others[pairs(weight[:, others])]
    bands = [binarized(band) for band in haar(weight[:, both].transpose(2, 0, 1))]
    values[:, both] = haar(np.stack(bands)).transpose(1, 2, 0)
    rest = weight[:, chosen]
    found = np.zeros_like(rest)
    for _ in range(2):
        found = found + _along_columns(rest - found)
    values[:, chosen] = found
    codes = c * (k + salient)
    numbers = 3 * 2 * (c + 2 * salient) + k
    return Binarized(values, codes, 2 * codes + _NUMBER_BITS * numbers)


def _along_columns(columns: Float[np.ndarray, "c n"]) -> Float[np.ndarray, "c n"]:
    """Binarized after the Haar transform of neighboring rows; a last row without one repeats."""
    c, n = columns.shape
    even = np.concatenate([columns, columns[-1:]]) if c % 2 else columns
    bands = haar(even.reshape(-1, 2, n).transpose(1, 2, 0))
    back = haar(np.stack([binarized(band) for band in bands]))
    return back.transpose(2, 0, 1).reshape(-1, n)[:c]


def hbvla_policy(measured: Measurements, setting: Setting) -> Policy:
    """The packed policy, whose rows have 16 bits and binarized values."""
    statistics = measured.statistics("action")
    layers = quantizable_layers(measured.policy.model, measured.rules)
    found, weights = [], 0
    for done, (path, layer) in enumerate(layers.items()):
        measured.progress(setting.name, done, len(layers))
        mean, weight = statistics.means[path], weight_rows(layer)
        second_moment = statistics.covariance(path) + np.outer(mean, mean)
        found.append(hbvla(np.asarray(weight, np.float64), second_moment))
        weights += weight.size
    measured.progress(setting.name, len(layers), len(layers))
    details: dict[str, Any] = {
        "bits of codes per weight": sum(one.code_bits for one in found) / weights,
        "bits per weight": sum(one.all_bits for one in found) / weights,
    }

    def rows() -> Iterator[QuantizedRows]:
        for one in found:
            c, k = one.values.shape
            yield QuantizedRows(
                bits=np.full(c, SOURCE), codes=np.zeros((c, k), np.int8),
                scales=np.ones((c, 1), np.float32), grid="rtn",
            )  # fmt: skip

    sources = [one.values.astype(ml_dtypes.bfloat16).astype(np.float32) for one in found]
    return packed_policy(measured, setting, rows(), sources=sources, details=details)
