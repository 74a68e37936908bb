"""Attention: the CPU kernel's against XLA's, in turn in one process.

python benchmarks/attention.py
taskset -c 1 python benchmarks/attention.py    # on one core
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.kernels import cpu, cpu_attention
from qvla_jax.models.attention import attention

# Observations, positions, heads, numbers of a head; rounds.
SHAPES = (
    ((2, 69, 4, 32), 200),
    ((1, 152, 6, 32), 200),
    ((1, 257, 16, 72), 200),
    ((1, 600, 32, 128), 12),
)


def main() -> None:
    """Prints the least time of each and their largest difference."""
    print(f"{cpu.instruction_set()}\n")
    print("| shape | XLA | kernel | ratio | largest difference |\n|---|---|---|---|---|")
    for shape, rounds in SHAPES:
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
        functions = [jax.jit(attention), jax.jit(cpu_attention.attention)]
        first, second = (np.asarray(function(q, k, v)) for function in functions)
        least = [float("inf")] * 2
        for _ in range(rounds):
            for i, function in enumerate(functions):
                start = time.perf_counter()
                jax.block_until_ready(function(q, k, v))
                least[i] = min(least[i], time.perf_counter() - start)
        xla, kernel = least
        print(
            f"| {', '.join(map(str, shape))} | {xla * 1e3:.3f} ms | {kernel * 1e3:.3f} ms "
            f"| {xla / kernel:.1f}x | {np.max(np.abs(first - second)):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
