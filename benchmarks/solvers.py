"""Every solver at full scale, and where proofs fail: `make bench-solvers`.

Prints tables of cost, bound, gap, bytes, seconds and status: a synthetic table of OpenVLA-7B's size
(1.85 million channels x 5 options) at 3, 4 and 6 bits per weight, the two fast solvers again and
the whole front at once, further constraints, the random families at 100,000 channels, and searches
with an objective that is no sum. Less than 15 minutes on 2 cores. `--only front families` prints
some of the parts; `--channels 1852784` takes the families to full size. CPU seconds say what the
wall clock would on an idle machine; they count all threads.
"""

import argparse
import dataclasses
import functools
import os
import resource
import time
from collections.abc import Callable, Mapping

import numpy as np

from qvla_jax.solvers import (
    AllocationProblem,
    Resource,
    SearchResult,
    Solution,
    available,
    compare,
    count_of,
    evolve,
    instances,
    local_search,
    settings_of,
    solve,
    sweep,
    verify,
)

_REPEATS = 3


def main() -> None:
    """Prints the tables."""
    parts = {
        "openvla": openvla,
        "fast": fast,
        "front": front,
        "constraints": constraints,
        "families": families,
        "evolution": evolution,
        "searches": searches,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of OpenVLA-7B's rows")
    parser.add_argument("--channels", type=int, default=100_000, help="of a random instance")
    parser.add_argument("--time-limit", type=float, default=50.0, help="seconds for one solver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} processors, load at the start (1, 5, 15 minutes) {load}")
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


def fast(arguments: argparse.Namespace) -> None:
    """The fast solvers, the best of some repeats in turn."""
    print(f"\n== Fast solvers, OpenVLA-like, best of {_REPEATS}")
    for bits in (3.0, 4.0, 6.0):
        problem = instances.openvla_like(
            budget_bits=bits, scale=arguments.scale, seed=arguments.seed
        )
        ways = {
            f"{name}, {bits:g} bits": functools.partial(solve, problem, name)
            for name in ("greedy:marginal", "lagrangian")
        }
        timed(ways)


def front(arguments: argparse.Namespace) -> None:
    """The whole front against single solutions, the best of some repeats in turn."""
    problem = instances.openvla_like(scale=arguments.scale, seed=arguments.seed)
    hundred = sweep(problem, 100)
    ways: dict[str, Callable[[], object]] = {
        "lagrangian, 1 budget": functools.partial(solve, problem, "lagrangian"),
        "sweep, 1 budget": functools.partial(sweep, problem, [problem.budget]),
        "sweep, 100 budgets": functools.partial(sweep, problem, 100),
        "choice of one of its points": functools.partial(hundred.choice, 50),
    }
    print(f"\n== Front, OpenVLA-like, best of {_REPEATS}")
    timed(ways)


def timed(ways: Mapping[str, Callable[[], object]]) -> None:
    """Prints wall-clock and CPU seconds, each the least of some repeats, relative to the first."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    least = {name: np.min(seconds, axis=0) for name, seconds in taken.items()}
    first = next(iter(least.values()))
    for name, (wall, cpu) in least.items():
        print(
            f"{name:<28} {wall:>8.3f} s {wall / first[0]:>6.2f} x   "
            f"CPU {cpu:>8.3f} s {cpu / first[1]:>6.2f} x",
            flush=True,
        )


def constraints(arguments: argparse.Namespace) -> None:
    """What further constraints cost beside the bytes alone, and what the bound proves of it."""
    problem = instances.openvla_like(scale=arguments.scale, seed=arguments.seed)
    free = solve(problem)
    shape = problem.channels, problem.options
    # At 16 bits a weight takes two bytes. Tokens of a forward pass: patches, or the language
    # model's sequence; activations have 16 bits.
    languages = np.array([name.startswith("llama") for name in problem.group_names or ()])
    tokens = np.where(languages, 600, 256)[problem.group_of]
    products = (problem.sizes.max(axis=1) // 2 * tokens)[:, None]
    bitops = products * np.array([0, 2, 4, 8, 16]) * 16
    used = int(bitops[np.arange(problem.channels), free.choice].sum())
    half = int((free.choice == 0).sum()) // 2
    cases = {
        "tiles of 16": (dict(multiples=np.array([1, 16, 16, 16, 1])), "greedy:aligned"),
        "tiles of 128": (dict(multiples=np.array([1, 128, 128, 128, 1])), "greedy:aligned"),
        "2 bits or more in llama": (dict(minimums=languages.astype(np.int64)), "greedy:marginal"),
        "BitOps, 5 % less": (
            dict(resources=(Resource("BitOps", bitops, int(0.95 * used)),)),
            "lagrangian",
        ),
        f"exactly {half:,} pruned": (
            dict(resources=count_of(0, shape, least=half, most=half)),
            "lagrangian",
        ),
    }
    print("\n== Further constraints, OpenVLA-like, 4 bits per weight")
    for label, (changes, name) in cases.items():
        limited = dataclasses.replace(problem, **changes)
        cpu = time.process_time()
        solution = solve(limited, name)
        cpu = time.process_time() - cpu
        checked(label, limited, solution)
        print(
            f"{label:<24} {name:<16} cost {solution.cost / free.cost - 1:>+9.2%}   "
            f"gap {solution.gap:>8.1e}   {solution.seconds:>7.2f} s, CPU {cpu:>7.2f} s",
            flush=True,
        )


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


def searches(arguments: argparse.Namespace) -> None:
    """Searches at full size with an objective that no sum of costs gives.

    Modules weigh otherwise than the costs say, and errors within a module reinforce each other.
    """
    problem = instances.openvla_like(scale=arguments.scale, seed=arguments.seed)
    weights = np.exp(np.random.default_rng(arguments.seed).normal(0, 1, problem.group_count))
    rows = np.arange(problem.channels)

    def evaluate(choices: np.ndarray) -> np.ndarray:
        errors: list[float] = []
        for choice in choices:
            costs = problem.costs[rows, choice]
            modules = np.bincount(problem.group_of, costs, problem.group_count)
            errors.append(float(weights @ modules + modules @ modules / modules.max()))
        return np.array(errors)

    ways: dict[str, Callable[[], SearchResult]] = {
        "local_search": functools.partial(local_search, problem, evaluate, rounds=6, population=4),
        "evolve": functools.partial(evolve, problem, evaluate, generations=4, population=8),
    }
    print("\n== Searches with a black-box objective, OpenVLA-like, 4 bits per weight")
    for name, run in ways.items():
        cpu = time.process_time()
        found = run()
        cpu = time.process_time() - cpu
        if problem.violation(found.choice) is not None or found.error > found.start_error:
            raise SystemExit(f"{name}: infeasible, or worse than its start")
        print(
            f"{name:<16} {found.start_error:.6g} -> {found.error:.6g} "
            f"({found.error / found.start_error - 1:+.2%}), {found.evaluations} candidates, "
            f"{found.seconds:.1f} s, CPU {cpu:.1f} s",
            flush=True,
        )


def table(problem: AllocationProblem, names: list[str], limit: float) -> None:
    """Prints one comparison, every certificate in it checked anew."""
    limited = {name: {"time_limit": limit} for name in names if "time_limit" in settings_of(name)}
    comparison = compare(problem, names, settings=limited)
    print(comparison, flush=True)
    for row in comparison.rows:
        if row.solution is not None:
            checked(row.label, problem, row.solution)


def checked(label: str, problem: AllocationProblem, solution: Solution) -> None:
    """Ends the benchmark where a certificate does not hold."""
    if failures := verify(problem, solution).failures:
        raise SystemExit(f"{label}: {' '.join(failures)}")


if __name__ == "__main__":
    main()
