"""Every solver at full scale, and where proofs fail: `make bench-solvers`.

Prints tables of cost, bound, gap, bytes, seconds and status: a synthetic table of OpenVLA-7B's size
(1.85 million channels x 5 options) at 3, 4 and 6 bits per weight, the whole front at once, and the
random families at 100,000 channels. About five minutes on 2 cores. `--only front families` prints
some of the parts; `--channels 1852784` takes the families to full size.
"""

import argparse
import functools
import resource
import time
from collections.abc import Callable

from qvla_jax.solvers import (
    AllocationProblem,
    available,
    compare,
    instances,
    settings_of,
    solve,
    sweep,
    verify,
)

_REPEATS = 3


def main() -> None:
    """Prints the tables."""
    parts = {"openvla": openvla, "front": front, "families": families, "evolution": evolution}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of OpenVLA-7B's rows")
    parser.add_argument("--channels", type=int, default=100_000, help="of a random instance")
    parser.add_argument("--time-limit", type=float, default=50.0, help="seconds for one solver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    for name in arguments.only:
        parts[name](arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"peak resident memory so far {peak:.2f} GiB", flush=True)


def openvla(arguments: argparse.Namespace) -> None:
    """Every solver on the synthetic table of OpenVLA-7B."""
    # Evolution has a table of its own below; dynamic programming's would not fit any memory.
    names = [n for n in available() if n not in ("dynamic_programming", "evolutionary")]
    for bits in (3.0, 4.0, 6.0):
        problem = instances.openvla_like(
            budget_bits=bits, scale=arguments.scale, seed=arguments.seed
        )
        print(f"\n== OpenVLA-like, {bits:g} bits per weight", flush=True)
        table(problem, names, arguments.time_limit)


def front(arguments: argparse.Namespace) -> None:
    """The whole front against single solutions, the best of some repeats in turn."""
    problem = instances.openvla_like(scale=arguments.scale, seed=arguments.seed)
    ways: dict[str, Callable[[], object]] = {
        "lagrangian, 1 budget": functools.partial(solve, problem, "lagrangian"),
        "sweep, 1 budget": functools.partial(sweep, problem, [problem.budget]),
        "sweep, 100 budgets": functools.partial(sweep, problem, 100),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    one = min(seconds["lagrangian, 1 budget"])
    print(f"\n== Front, OpenVLA-like, best of {_REPEATS}")
    for name, taken in seconds.items():
        print(f"{name:<24} {min(taken):>9.3f} s {min(taken) / one:>9.2f} x")


def families(arguments: argparse.Namespace) -> None:
    """The random families, on which proofs may fail."""
    for family in instances.families():
        problem = instances.random_instance(
            family, channels=arguments.channels, seed=arguments.seed
        )
        print(f"\n== {family}, {arguments.channels:,} channels", flush=True)
        table(problem, ["greedy:marginal", "lagrangian", "core", "ilp:core"], arguments.time_limit)


def evolution(arguments: argparse.Namespace) -> None:
    """Evolution on the summed cost."""
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
