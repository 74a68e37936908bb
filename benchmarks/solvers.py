"""Every solver at full scale, and where proofs fail: `make bench-solvers`.

Prints tables of cost, bound, gap, bytes, seconds and status: a synthetic table of OpenVLA-7B's size
(1.85 million channels x 5 options) at 3, 4 and 6 bits per weight, the whole front at once, and the
random families at 100,000 channels. About five minutes on 2 cores.
"""

import argparse
import resource
import time

from qvla_jax.solvers import (
    AllocationProblem,
    available,
    compare,
    instances,
    settings_of,
    sweep,
    verify,
)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of OpenVLA-7B's rows")
    parser.add_argument("--channels", type=int, default=100_000, help="of a random instance")
    parser.add_argument("--time-limit", type=float, default=50.0, help="seconds for one solver")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Evolution has a table of its own below; dynamic programming's would not fit any memory.
    names = [n for n in available() if n not in ("dynamic_programming", "evolutionary")]
    for bits in (3.0, 4.0, 6.0):
        problem = instances.openvla_like(
            budget_bits=bits, scale=arguments.scale, seed=arguments.seed
        )
        print(f"\n== OpenVLA-like, {bits:g} bits per weight", flush=True)
        table(problem, names, arguments.time_limit)
    start = time.perf_counter()
    sweep(problem, 1)
    one = time.perf_counter() - start
    start = time.perf_counter()
    sweep(problem, 100)
    print(f"\n== Front: 1 budget {one:.2f} s, 100 budgets {time.perf_counter() - start:.2f} s")
    for family in instances.families():
        problem = instances.random_instance(
            family, channels=arguments.channels, seed=arguments.seed
        )
        print(f"\n== {family}, {arguments.channels:,} channels", flush=True)
        table(problem, ["greedy:marginal", "lagrangian", "core", "ilp:core"], arguments.time_limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory {peak:.2f} GiB")
    print("\n== Evolution on the summed cost, OpenVLA-like, 4 bits per weight")
    problem = instances.openvla_like(scale=arguments.scale, seed=arguments.seed)
    table(problem, ["greedy:marginal", "evolutionary"], arguments.time_limit)


def table(problem: AllocationProblem, names: list[str], limit: float) -> None:
    """Prints one comparison, every certificate in it checked anew."""
    limited = {name: {"time_limit": limit} for name in names if "time_limit" in settings_of(name)}
    comparison = compare(problem, names, settings=limited)
    print(comparison, flush=True)
    for row in comparison.rows:
        if row.solution is not None and (failures := verify(problem, row.solution).failures):
            raise SystemExit(f"{row.label}: {' '.join(failures)}")


if __name__ == "__main__":
    main()
