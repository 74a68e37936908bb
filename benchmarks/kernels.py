"""Times the packed product against other libraries' products of the same matrix.

    python benchmarks/kernels.py                                   # Llama-2-7B and both towers
    python benchmarks/kernels.py --shapes 4096x4096 --rows 1 8
    python benchmarks/kernels.py --shapes 4096x4096 --json > a.json   # shape by shape, ...
    python benchmarks/kernels.py --read a.json b.json                 # ... and all tables at once

Every line is one product y = x W^T on one core. Weights are copied until they exceed the caches and
are visited in turn, so that few rows run at the speed of memory. All products of one row count are
timed in turn, round after round; the figure is the shortest call of all rounds, in microseconds of
CPU time, which other processes on the machine disturb least. Rivals are added where they are
installed (benchmarks/rivals.py). Below the tables stand the targets, each with the ratio that was
measured at each shape: of the best rival's time to ours, per-channel weights against per-channel
ones and groups against groups.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One core, before any library counts them. Threads of XLA's pool share it.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from rivals import (  # noqa: E402
    Copies,
    Product,
    ggml_products,
    openvino_products,
    torch_products,
)

from qvla_jax import kernels  # noqa: E402
from qvla_jax.kernels import cpu  # noqa: E402
from qvla_jax.quantization.rows import QuantizedRows  # noqa: E402

# Output channels x inputs: Llama-2-7B's, and what the two towers have beside.
SHAPES = (
    "4096x4096", "22016x4096", "4096x11008",
    "3072x1024", "4096x1024", "1024x4096",
    "3456x1152", "4304x1152", "1152x4304",
)  # fmt: skip
MIXED = {2: 0.25, 4: 0.5, 8: 0.125, 16: 0.125}  # 5.5 bits per weight
MIXED_BITS = sum(bits * share for bits, share in MIXED.items())
HALF, INT8 = "bfloat16 activations", "int8 activations"

# Product -> microseconds of one call.
Times = dict[str, float]
# Shape -> rows -> times.
Results = dict[str, dict[int, Times]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of times that is asked for; rivals and ours are beginnings of products' names."""

    what: str
    rows: tuple[int, ...]
    rivals: tuple[str, ...]
    ours: tuple[str, ...]
    least: float

    def ratio(self, times: Times) -> float | None:
        """The best rival's time over our best; None if one was not measured."""
        best = [
            min((t for name, t in times.items() if name.startswith(begins)), default=None)
            for begins in (self.rivals, self.ours)
        ]
        return None if best[0] is None or best[1] is None else best[0] / best[1]


FOUR, GROUPED = "qvla 4 bits, per channel", "qvla 4 bits, groups of 128"
GROUPED_RIVALS = ("OpenVINO int4, groups", "ggml q4", "PyTorch int4")
W8A8 = "PyTorch dynamic int8"
PREFILL = (64, 600)
TARGETS = (
    Target("4 bits per channel, best rival", (1,), ("OpenVINO int4,", W8A8), (FOUR,), 1.5),
    Target("4 bits in groups, best rival", (1,), GROUPED_RIVALS, (GROUPED,), 1.5),
    Target("8 bits, W8A8", (1,), (W8A8,), ("qvla 8 bits",), 1.0),
    Target("4 bits per channel, best rival", (8,), ("OpenVINO int4,", W8A8), (FOUR,), 1.3),
    Target("4 bits in groups, best rival", (8,), GROUPED_RIVALS, (GROUPED,), 1.3),
    Target("4 bits, int8 activations, W8A8", PREFILL, (W8A8,), (f"{FOUR}, {INT8}",), 1.0),
    Target(
        "4 bits, int8 activations, OpenVINO", PREFILL, ("OpenVINO int4,",),
        (f"{FOUR}, {INT8}",), 1.2,
    ),
    Target(
        "groups, int8 activations, OpenVINO", PREFILL, ("OpenVINO int4, groups",),
        (f"{GROUPED}, {INT8}",), 1.0,
    ),
    Target(
        "4 bits, bfloat16 activations, PyTorch bfloat16", PREFILL, ("PyTorch bfloat16",),
        (f"{FOUR}, {HALF}",), 0.95,
    ),
    # Ours against ours: no slower than the bytes say, and 15 % over 4 bits.
    Target("mixed, 4 bits", (1,), (FOUR,), ("qvla mixed",), 4 / MIXED_BITS),
    Target("mixed, 4 bits", PREFILL, (f"{FOUR}, {INT8}",), (f"qvla mixed, {INT8}",), 1 / 1.15),
)  # fmt: skip
# Of the rate that this core reads memory at, in decoding.
LEAST_BANDWIDTH = 0.85
# A path without AVX-512 may take this many times as long as one with it.
MOST_WITHOUT = 3.0


def our_products(c: int, k: int, copies: Copies) -> Iterator[tuple[str, Product]]:
    """Our kernel at several widths, with bfloat16 and 8-bit activations."""
    rng = np.random.default_rng(0)
    shares = list(MIXED)
    widths = {f"{b} bits": np.full(c, b) for b in (2, 4, 8, 16)}
    widths["mixed"] = rng.choice(shares, c, p=[MIXED[b] for b in shares])
    for label, bits in widths.items():
        for group in (None, 128) if label == "4 bits" and k % 128 == 0 else (None,):
            packed = random_packed(c, k, bits, group)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
            # Memory of its own for each, as in a packed layer.
            weights = [jax.device_put(cpu.prepare(packed)) for _ in range(copies(size))]
            kind = {128: ", groups of 128", None: ", per channel"}[group]
            name = f"qvla {label}{kind if label == '4 bits' else ''}"
            for activations in (16, 8):
                if label == "16 bits" and activations == 8:
                    continue
                run = jax.jit(lambda x, w, a=activations: cpu.matmul(x, w, a))

                def bound(x: np.ndarray, run=run, weights=weights) -> Callable[[int], object]:
                    half = jnp.asarray(x, jnp.bfloat16)
                    return lambda i: run(half, weights[i % len(weights)]).block_until_ready()

                yield f"{name}, {HALF if activations == 16 else INT8}", bound


def random_packed(c: int, k: int, bits: np.ndarray, group: int | None) -> kernels.PackedWeight:
    """Random codes: what they are does not matter here, and packing real rows takes long."""
    rng = np.random.default_rng(1)
    groups = 1 if group is None else -(-k // group)
    codes = rng.integers(-2, 2, (c, k), np.int8)
    # Powers of two are exact in bfloat16.
    scales = 2.0 ** rng.integers(-8, -4, (c, groups)).astype(np.float32)
    weight = rng.normal(size=(c, k)).astype(ml_dtypes.bfloat16)
    rows = QuantizedRows(bits=bits, codes=codes, scales=scales, grid="rtn", group=group)
    return kernels.pack_rows(rows, weight)


def xla_products(c: int, k: int, copies: Copies) -> Iterator[tuple[str, Product]]:
    """XLA in float32."""
    weights = [jnp.ones((k, c), jnp.float32) for _ in range(copies(4 * c * k))]
    run = jax.jit(jnp.matmul)

    def bound(x: np.ndarray) -> Callable[[int], object]:
        given = jnp.asarray(x)
        return lambda i: run(given, weights[i % len(weights)]).block_until_ready()

    yield "XLA float32", bound


def measure(products: dict[str, Callable[[int], object]], seconds: float, copies: int = 1) -> Times:
    """Shortest CPU time of a call of each product, in microseconds.

    Copies are called once before: some libraries arrange a weight when it is first used.
    """
    best = dict.fromkeys(products, float("inf"))
    for call in products.values():
        for i in range(copies):
            call(i)
    call_number, end = 0, time.perf_counter() + seconds * len(products)
    while time.perf_counter() < end:
        for name, call in products.items():
            for _ in range(3):
                call_number += 1
                start = time.process_time()
                call(call_number)
                best[name] = min(best[name], time.process_time() - start)
    return {name: 1e6 * value for name, value in best.items()}


def read_rate(seconds: float) -> float:
    """Bytes a second that this core reads from memory: the best of three simple reductions."""
    data = np.ones(1 << 28, np.uint8)
    reductions: dict[str, Callable[[int], object]] = {
        "dot": lambda i: np.dot(data.view(np.float32), data.view(np.float32)),
        "or": lambda i: np.bitwise_or.reduce(data.view(np.uint64)),
        "max": lambda i: data.max(),
    }
    return 1e6 * data.nbytes / min(measure(reductions, seconds).values())


def time_shape(shape: str, arguments: argparse.Namespace) -> dict[int, Times]:
    """Times of all products of a shape, by rows."""
    c, k = map(int, shape.split("x"))

    def copies(size: int) -> int:
        return max(2, -(-(arguments.rotation_mib << 20) // size))

    makers = [our_products(c, k, copies)]
    if not arguments.ours:
        makers += [
            xla_products(c, k, copies),
            torch_products(c, k, copies),
            openvino_products(c, k, copies),
            ggml_products(c, k, copies, arguments.ggml),
        ]
    products = dict(itertools.chain(*makers))
    times = {}
    for rows in arguments.rows:
        x = np.random.default_rng(2).normal(size=(rows, k)).astype(np.float32)
        bound = {name: product(x) for name, product in products.items()}
        first = rows == arguments.rows[0]
        # 2 bits have the most copies.
        times[rows] = measure(bound, arguments.seconds, copies(c * k // 4) if first else 1)
    return times


def time_path(path: str, arguments: argparse.Namespace) -> Results:
    """Our times by shape on another path: one path in one process."""
    command = [sys.executable, __file__, "--ours", "--json", "--shapes", *arguments.shapes]
    command += ["--rows", *map(str, arguments.rows), "--seconds", str(arguments.seconds)]
    command += ["--rotation-mib", str(arguments.rotation_mib)]
    environment = os.environ | {"QVLA_CPU_KERNEL": path}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(answer.stdout)
    if f"kernel {path}," not in found["machine"]:
        sys.exit(f"{path}: this processor does not run it ({found['machine']})")
    return by_rows(found["times"])


def by_rows(found: dict[str, dict[str, Times]]) -> Results:
    """What JSON holds, with numbers of rows as numbers."""
    return {s: {int(rows): t for rows, t in by.items()} for s, by in found.items()}


def print_times(shape: str, times: dict[int, Times]) -> None:
    """The times of a shape, in Markdown."""
    print(f"\n| {shape} | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in times) + " |")
    print("|---" * (1 + len(times)) + "|")
    for name in next(iter(times.values())):
        print(f"| {name} | " + " | ".join(f"{t[name]:,.0f}" for t in times.values()) + " |")


def print_targets(times: Results, rates: dict[str, float]) -> None:
    """What was asked for, and what was measured at each shape; bold where it was missed."""
    print("\n| target | rows | at least | " + " | ".join(times) + " |")
    print("|---" * (3 + len(times)) + "|")
    for target in TARGETS:
        for rows in target.rows:
            ratios = [target.ratio(by.get(rows, {})) for by in times.values()]
            print_target(target.what, rows, target.least, ratios)
    shares = []
    for shape, by in times.items():
        decode = [t for name, t in by.get(1, {}).items() if name.startswith(FOUR)]
        c, k = map(int, shape.split("x"))
        shares.append(1e6 * c * k / 2 / min(decode) / rates[shape] if decode else None)
    print_target("4 bits, share of the read rate", 1, LEAST_BANDWIDTH, shares)


def print_target(what: str, rows: int, least: float, ratios: list[float | None]) -> None:
    """A line of the table; none where nothing was measured."""
    if any(ratio is not None for ratio in ratios):
        cells = ["" if r is None else f"{r:.2f}" if r >= least else f"**{r:.2f}**" for r in ratios]
        print(f"| {what} | {rows} | {least:.2f} | " + " | ".join(cells) + " |")


def print_path(path: str, best: Results, own: Results) -> None:
    """How many times as long a path takes as the best one, at worst, by rows and product."""
    rows = list(next(iter(best.values())))
    print(f"\n| {path} over the best, longest of all shapes | " + " | ".join(map(str, rows)) + " |")
    print("|---" * (1 + len(rows)) + "|")
    names = dict.fromkeys(name for by in own.values() for name in by[rows[0]])
    for name in names:
        ratios = [
            max(own[s][r][name] / best[s][r][name] for s in own if name in own[s][r]) for r in rows
        ]
        cells = [f"{r:.1f}" if r <= MOST_WITHOUT else f"**{r:.1f}**" for r in ratios]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Prints tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="output channels x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 600])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each product and row count")
    parser.add_argument("--rotation-mib", type=int, default=150, help="copies of a weight together")
    parser.add_argument("--ggml", type=Path, help="folder of its libraries")
    parser.add_argument("--ours", action="store_true", help="no rivals")
    parser.add_argument(
        "--paths", nargs="+", default=[], help="other paths of our kernel as well, such as avx2"
    )
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument(
        "--read", type=Path, nargs="+", help="print the tables of files of JSON; measures nothing"
    )
    arguments = parser.parse_args()
    if arguments.read:
        runs = [json.loads(path.read_text()) for path in arguments.read]
    else:
        runs = [run(arguments)]
    if arguments.json:
        print(json.dumps(runs[0]))
        return
    times, paths, rates = {}, {}, {}
    for found in runs:
        own = by_rows(found["times"])
        times |= own
        for path, by in found["paths"].items():
            paths[path] = paths.get(path, {}) | by_rows(by)
        rates |= dict.fromkeys(own, found["rate"])
        print(
            f"{', '.join(own)}: {found['machine']}; this core reads {found['rate'] / 1e9:.1f} GB/s"
        )
    print("\nShortest call in microseconds of CPU time, one core:")
    for shape, by in times.items():
        print_times(shape, by)
    print_targets(times, rates)
    for path, own in paths.items():
        print_path(path, times, own)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all shapes: what `--json` prints."""
    load = os.getloadavg()[0]
    rate = read_rate(arguments.seconds)
    with jax.default_matmul_precision("float32"):
        times = {shape: time_shape(shape, arguments) for shape in arguments.shapes}
    return {
        "machine": f"kernel {cpu.instruction_set()}, JAX {jax.__version__}, load before {load:.1f}",
        "rate": rate,
        "times": times,
        "paths": {path: time_path(path, arguments) for path in arguments.paths},
    }


if __name__ == "__main__":
    main()
