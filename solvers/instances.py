"""Synthetic instances with seeds, for tests and benchmarks."""

from collections.abc import Callable

import numpy as np

from qvla_jax.errors import InputError, unknown
from qvla_jax.solvers.arrays import FloatArray, IntArray
from qvla_jax.solvers.problem import AllocationProblem

# OpenVLA-7B's quantized layers, (name, layers, output channels, fan-in): the two vision towers and
# Llama-2-7B.
_OPENVLA = (
    ("dinov2.qkv", 24, 3072, 1024),
    ("dinov2.proj", 24, 1024, 1024),
    ("dinov2.fc1", 24, 4096, 1024),
    ("dinov2.fc2", 24, 1024, 4096),
    ("siglip.qkv", 27, 3456, 1152),
    ("siglip.proj", 27, 1152, 1152),
    ("siglip.fc1", 27, 4304, 1152),
    ("siglip.fc2", 27, 1152, 4304),
    ("llama.qkvo", 32, 4 * 4096, 4096),
    ("llama.gate_up", 32, 2 * 11008, 4096),
    ("llama.down", 32, 4096, 11008),
)
_BITS = np.array([0, 2, 4, 8, 16])
# Bytes stored with each row: a bfloat16 scale for 2 to 8 bits, and its output index unless it is
# pruned.
_OVERHEAD = np.array([0, 6, 6, 6, 4])


def openvla_like(
    *, budget_bits: float = 4.0, scale: float = 1.0, tail: float = 2.0, seed: int = 0
) -> AllocationProblem:
    """A table of OpenVLA-7B's shape: its layers, its row sizes, and heavy-tailed costs.

    A row's cost at b bits is `importance * 4**-b` times noise, where importances are log-normal
    over layers and over rows; pruning costs what the row carries, and 16 bits cost nothing. About
    one row in a hundred is dead (no cost at all), and noise makes some rows non-monotone.

    Args:
        budget_bits: bytes of the budget, in bits per weight.
        scale: share of each layer's rows to keep; 1 gives 1.85 million channels.
        tail: standard deviation of the logarithm of the importances.
        seed: seed.
    """
    rng = np.random.default_rng(seed)
    fan_in: list[IntArray] = []
    level: list[FloatArray] = []
    groups: list[IntArray] = []
    names: list[str] = []
    for name, layers, rows, inputs in _OPENVLA:
        kept = max(1, round(rows * scale))
        for layer in range(layers):
            fan_in.append(np.full(kept, inputs, dtype=np.int64))
            level.append(np.full(kept, rng.normal(0.0, tail)))
            groups.append(np.full(kept, len(names), dtype=np.int64))
            names.append(f"{name}.{layer}")
    width = np.concatenate(fan_in)
    importance = np.exp(np.concatenate(level) + rng.normal(0.0, tail, len(width))) * 1e-9
    importance[rng.random(len(width)) < 0.01] = 0.0
    noise = np.exp(rng.normal(0.0, 0.5, (len(width), len(_BITS))))
    decay = np.where(_BITS == 0, 3.0, 4.0 ** -_BITS.astype(np.float64) * 16.0)
    costs = importance[:, None] * decay * noise
    costs[:, -1] = 0.0
    words = -(-width[:, None] * _BITS // 32)
    return AllocationProblem(
        costs=costs,
        sizes=4 * words + _OVERHEAD,
        budget=int(budget_bits / 8 * width.sum()),
        groups=np.concatenate(groups),
        group_names=tuple(names),
    )


def random_instance(
    family: str,
    *,
    channels: int = 100,
    options: int = 5,
    largest: int = 1000,
    tightness: float = 0.5,
    seed: int = 0,
) -> AllocationProblem:
    """An instance of one of the families by which multiple-choice knapsack algorithms are judged.

    "uncorrelated", "weakly_correlated", "strongly_correlated" and "subset_sum" follow Pisinger ("A
    minimal algorithm for the multiple-choice knapsack problem", 1995), with profits turned into
    costs; "monotone" (sizes and profits sorted) follows Sinha and Zoltners (1979). Integer costs
    make many ties. "heavy_tailed" has log-normal costs that fall by powers of four.

    Args:
        family: one of `families()`.
        channels: C.
        options: n.
        largest: sizes are drawn from 1 .. largest.
        tightness: where the budget lies between the smallest and the largest total size.
        seed: seed.

    Raises:
        InputError: there is no such family.
    """
    if family not in _FAMILIES:
        raise InputError(unknown("family", family, _FAMILIES))
    rng = np.random.default_rng(seed)
    profits, sizes = _FAMILIES[family](rng, channels, options, largest)
    costs = profits.max(axis=1, keepdims=True) - profits
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    return AllocationProblem(costs=costs, sizes=sizes, budget=low + int(tightness * (high - low)))


def families() -> tuple[str, ...]:
    """The names that `random_instance` knows."""
    return tuple(_FAMILIES)


_Drawn = tuple[FloatArray, IntArray]


def _uncorrelated(rng: np.random.Generator, channels: int, options: int, largest: int) -> _Drawn:
    profits = rng.integers(1, largest, (channels, options), endpoint=True)
    return profits.astype(np.float64), rng.integers(1, largest, (channels, options), endpoint=True)


def _weakly_correlated(
    rng: np.random.Generator, channels: int, options: int, largest: int
) -> _Drawn:
    sizes = rng.integers(1, largest, (channels, options), endpoint=True)
    profits = sizes + rng.integers(-10, 10, (channels, options), endpoint=True)
    return np.maximum(profits, 1).astype(np.float64), sizes


def _strongly_correlated(
    rng: np.random.Generator, channels: int, options: int, largest: int
) -> _Drawn:
    # Each option sums up the j smallest of the channel's items, which have profit = size + 10.
    items = np.sort(
        rng.integers(1, max(1, largest // options), (channels, options), endpoint=True), axis=1
    )
    return np.cumsum(items + 10, axis=1).astype(np.float64), np.cumsum(items, axis=1)


def _subset_sum(rng: np.random.Generator, channels: int, options: int, largest: int) -> _Drawn:
    sizes = rng.integers(1, largest, (channels, options), endpoint=True)
    return sizes.astype(np.float64), sizes


def _monotone(rng: np.random.Generator, channels: int, options: int, largest: int) -> _Drawn:
    profits, sizes = _uncorrelated(rng, channels, options, largest)
    return np.sort(profits, axis=1), np.sort(sizes, axis=1)


def _heavy_tailed(rng: np.random.Generator, channels: int, options: int, largest: int) -> _Drawn:
    sizes = np.sort(rng.integers(0, largest, (channels, options), endpoint=True), axis=1)
    importance = np.exp(rng.normal(0.0, 4.0, (channels, 1)))
    noise = np.exp(rng.normal(0.0, 0.5, (channels, options)))
    profits = -importance * 4.0 ** -np.arange(options) * noise
    return profits.astype(np.float64), sizes


_FAMILIES: dict[str, Callable[[np.random.Generator, int, int, int], _Drawn]] = {
    "uncorrelated": _uncorrelated,
    "weakly_correlated": _weakly_correlated,
    "strongly_correlated": _strongly_correlated,
    "subset_sum": _subset_sum,
    "monotone": _monotone,
    "heavy_tailed": _heavy_tailed,
}
