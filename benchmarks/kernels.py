"""Times the packed product against other products of the same matrix.

    python benchmarks/kernels.py --shape 4096x4096 --rows 1 8 64 600

Every line is one product y = x W^T on one core. Weights are copied until they exceed the caches and
are visited in turn, so that few rows run at the speed of memory. All products of one row count are
timed in turn, round after round; the figure is the shortest call of all rounds, in microseconds of
CPU time, which other processes on the machine disturb least. PyTorch's products are added where it
is installed.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

# One core, before any library counts them. Threads of XLA's pool share it.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from qvla_jax import kernels  # noqa: E402
from qvla_jax.kernels import cpu  # noqa: E402

ROTATION_BYTES = 150 << 20
MIXED = {2: 0.2, 4: 0.4, 8: 0.3, 16: 0.1}  # 6 bits per weight

# Rows of x -> a function that makes one call on the i-th copy of the weight and waits for it.
Products = dict[str, Callable[[int], object]]


def packed_products(c: int, k: int, x: np.ndarray) -> Products:
    """Our kernel at several widths, with bfloat16 and 8-bit activations."""
    rng = np.random.default_rng(0)
    shares = list(MIXED)
    widths = {f"{b} bits": np.full(c, b) for b in (2, 4, 8, 16)}
    widths["mixed 2/4/8/16"] = rng.choice(shares, c, p=[MIXED[b] for b in shares])
    products: Products = {}
    half = jnp.asarray(x, jnp.bfloat16)
    for label, bits in widths.items():
        for group in (None, 128) if label == "4 bits" else (None,):
            copies = rotate(
                jax.tree.map(jnp.asarray, cpu.prepare(random_packed(c, k, bits, group)))
            )
            name = f"qvla {label}" + (f", groups of {group}" if group else "")
            for activations in (16, 8):
                if label == "16 bits" and activations == 8:
                    continue
                run = jax.jit(lambda x, w, a=activations: cpu.matmul(x, w, a))
                kind = "bfloat16" if activations == 16 else "int8"
                products[f"{name}, {kind} activations"] = lambda i, run=run, copies=copies: run(
                    half, copies[i % len(copies)]
                ).block_until_ready()
    return products


def random_packed(c: int, k: int, bits: np.ndarray, group: int | None) -> kernels.PackedWeight:
    """Random codes: what they are does not matter here, and packing real rows takes long."""
    rng = np.random.default_rng(1)
    groups = 1 if group is None else -(-k // group)
    codes = rng.integers(-2, 2, (c, k), np.int8)
    # Powers of two are exact in bfloat16.
    scales = 2.0 ** rng.integers(-8, -4, (c, groups)).astype(np.float32)
    weight = rng.normal(size=(c, k)).astype(ml_dtypes.bfloat16)
    return kernels.pack(weight, bits, group, grid="rtn", codes=codes, scales=scales)


def xla_products(c: int, k: int, x: np.ndarray) -> Products:
    """XLA in float32."""
    weights = rotate(jnp.ones((k, c), jnp.float32))
    run = jax.jit(jnp.matmul)
    given = jnp.asarray(x, jnp.float32)
    return {
        "XLA float32": lambda i: run(given, weights[i % len(weights)]).block_until_ready(),
    }


def torch_products(c: int, k: int, x: np.ndarray) -> Products:
    """PyTorch in bfloat16, and its dynamic 8-bit linear layer; none where it is missing."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    half = torch.from_numpy(x).bfloat16()
    given = torch.from_numpy(x)
    count = copies_of(2 * c * k)
    halves = [torch.randn(c, k).bfloat16() for _ in range(count)]
    layers = []
    for _ in range(copies_of(c * k)):
        layer = torch.nn.Sequential(torch.nn.Linear(k, c, bias=False))
        layers.append(torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8))
    return {
        "PyTorch bfloat16": lambda i: torch.nn.functional.linear(half, halves[i % count]),
        "PyTorch dynamic int8 (W8A8)": lambda i: layers[i % len(layers)](given),
    }


def copies_of(size: int) -> int:
    """Copies of a weight that together exceed the caches."""
    return max(2, -(-ROTATION_BYTES // size))


def rotate(weight: object) -> list[object]:
    """Copies of a tree of arrays, each with memory of its own."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    return [jax.tree.map(jnp.array, weight) for _ in range(copies_of(size))]


def measure(products: Products, seconds: float) -> dict[str, float]:
    """Shortest CPU time of a call of each product, in microseconds."""
    best = dict.fromkeys(products, float("inf"))
    for call in products.values():
        call(0)
    call_number, end = 0, time.perf_counter() + seconds * len(products)
    while time.perf_counter() < end:
        for name, call in products.items():
            for _ in range(3):
                call_number += 1
                start = time.process_time()
                call(call_number)
                best[name] = min(best[name], time.process_time() - start)
    return {name: 1e6 * value for name, value in best.items()}


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096x4096", help="output channels x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 600])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product and row count")
    arguments = parser.parse_args()
    c, k = map(int, arguments.shape.split("x"))
    table: dict[str, list[float]] = {}
    load = os.getloadavg()[0]
    with jax.default_matmul_precision("float32"):
        for rows in arguments.rows:
            x = np.random.default_rng(2).normal(size=(rows, k)).astype(np.float32)
            products: Products = {}
            for make in (xla_products, torch_products, packed_products):
                products |= make(c, k, x)
            for name, microseconds in measure(products, arguments.seconds).items():
                table.setdefault(name, []).append(microseconds)
    machine = platform.processor() or platform.machine()
    print(f"{c} x {k}, one core, shortest call in microseconds of CPU time; JAX {jax.__version__}")
    print(f"kernel {cpu.instruction_set()} on {machine}, load before the run {load:.1f}")
    print("\n| product | " + " | ".join(f"{rows} rows" for rows in arguments.rows) + " |")
    print("|---" * (1 + len(arguments.rows)) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in row) + " |")


if __name__ == "__main__":
    main()
