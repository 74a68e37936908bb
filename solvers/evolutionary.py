"""Evolution strategies for effects that the knapsack does not model, in a searchable space.

A candidate is not a choice but a vector of log-multipliers, one for each module and one for each
option: the cost of option j of channel c above the channel's minimum is multiplied by

    exp(x[module of c] + x[modules + j]),

and the problem with these costs is solved by a fast solver. So every candidate is feasible, a
vector has a few hundred entries for millions of channels, and x = 0 is the separable solution,
where the search starts. (CMA-ES: Hansen and Ostermeier, 2001; SNES: Schaul, Glasmachers and
Schmidhuber, 2011; both from evosax.)
"""

import dataclasses
import importlib
import time
from typing import Any

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray, Progress, no_progress
from qvla_jax.solvers.blackbox import Objective, Search, SearchResult, inner_solver
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import Proposal, check_constraints, get_solver, register

_ALGORITHMS = {"cma_es": "CMA_ES", "snes": "SNES"}


def evolve(
    problem: AllocationProblem,
    evaluate: Objective,
    *,
    start: IntArray | None = None,
    algorithm: str = "cma_es",
    generations: int = 20,
    population: int = 12,
    spread: float = 0.3,
    inner: str | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    progress: Progress = no_progress,
) -> SearchResult:
    """Searches multipliers on the costs for a smaller measured error.

    Args:
        problem: the problem; without groups there are no multipliers of modules.
        evaluate: i64[p, C] -> f64[p], the error of candidates, all feasible.
        start: i64[C], measured first and returned if nothing is better; None takes the separable
            solution. The multipliers start from 1 either way.
        algorithm: "cma_es", or "snes" for very many modules.
        generations: rounds.
        population: candidates of a round.
        spread: standard deviation of the log-multipliers at the start.
        inner: the solver that turns multipliers into a choice; None takes a fast one that supports
            the problem's constraints.
        seed: seed.
        time_limit: seconds after which no further generation starts, or None.
        progress: called with the generations done.

    Raises:
        InputError: a setting is wrong, evosax is not installed, or the start is unusable.
    """
    if algorithm not in _ALGORITHMS:
        raise InputError(f"algorithm must be one of {', '.join(_ALGORITHMS)}, got {algorithm!r}.")
    if generations < 0 or population < 4 or not spread > 0:
        raise InputError(
            "evolutionary needs generations >= 0, a population of 4 or more and a positive spread; "
            f"got {generations}, {population}, {spread}."
        )
    began = time.perf_counter()
    solver = get_solver(inner or inner_solver(problem))
    check_constraints(problem, solver)
    search = Search(problem, evaluate, start, solver.name)
    scaled = _Scaled(problem)
    strategy = _Strategy(algorithm, scaled.dimensions, population, spread, seed)
    for generation in range(generations):
        progress("evolutionary", generation, generations)
        if time_limit is not None and time.perf_counter() - began > time_limit:
            break
        vectors = strategy.ask()
        if generation == 0:
            vectors[0] = 0.0  # the separable solution, whatever the start is
        candidates: list[IntArray] = []
        for vector in vectors:
            weighted = scaled.problem(vector)
            candidates.append(solver.function(weighted, **solver.settings({})).choice)
        strategy.tell(vectors, search.advance(candidates))
    progress("evolutionary", generations, generations)
    return search.result()


@register("evolutionary", requires=("evosax",), handles=("multiples", "resources"))
def evolutionary(
    problem: AllocationProblem,
    *,
    algorithm: str = "cma_es",
    generations: int = 10,
    population: int = 12,
    spread: float = 1e-3,
    seed: int = 0,
    time_limit: float | None = 50.0,
) -> Proposal:
    """Evolution strategy over multipliers per module and option, here on the summed cost.

    The summed cost is what the other solvers minimize directly; this is for comparison. It starts
    from their solution and is never worse. `evolve` takes a measured error instead.

    Args:
        problem: the problem.
        algorithm: "cma_es" or "snes".
        generations: rounds.
        population: candidates of a round, each solved once.
        spread: standard deviation of the log-multipliers at the start.
        seed: seed.
        time_limit: seconds after which no further generation starts, or None.
    """
    index = np.arange(problem.channels)

    def summed(choices: IntArray) -> FloatArray:
        return np.array([problem.costs[index, choice].sum() for choice in choices])

    found = evolve(
        problem,
        summed,
        algorithm=algorithm,
        generations=generations,
        population=population,
        spread=spread,
        seed=seed,
        time_limit=time_limit,
    )
    details = {"evaluations": found.evaluations, "start_cost": found.start_error}
    return Proposal(found.choice, details=details)


class _Scaled:
    """The problem under log-multipliers."""

    def __init__(self, problem: AllocationProblem):
        self._problem = problem
        costs = problem.costs
        if problem.allowed is not None:
            costs = np.where(problem.allowed, costs, np.inf)
        # Relative to the channel's minimum, so that no multiplier applies to a negative cost;
        # closed options keep a finite cost.
        self._above = np.maximum(problem.costs - costs.min(axis=1, keepdims=True), 0.0)
        # A single group is scaled by the options' multipliers as well.
        self._modules = problem.group_count if problem.group_count > 1 else 0
        self.dimensions = self._modules + problem.options

    def problem(self, vector: FloatArray) -> AllocationProblem:
        # Beyond e^8 in either direction a multiplier only means "first" or "last".
        multipliers = np.exp(np.clip(vector, -8.0, 8.0))
        costs = self._above * multipliers[self._modules :]
        if self._modules:
            costs = costs * multipliers[: self._modules][self._problem.groups][:, None]
        return dataclasses.replace(self._problem, costs=costs)


class _Strategy:
    """evosax's ask and tell, numpy in and out."""

    def __init__(self, algorithm: str, dimensions: int, population: int, spread: float, seed: int):
        self._jax: Any = importlib.import_module("jax")
        algorithms: Any = importlib.import_module("evosax.algorithms")
        with self._plain():
            zeros = self._jax.numpy.zeros(dimensions)
            kind = getattr(algorithms, _ALGORITHMS[algorithm])
            self._strategy = kind(population_size=population, solution=zeros)
            self._params = self._strategy.default_params.replace(std_init=spread)
            self._key = self._jax.random.key(seed)
            self._state = self._strategy.init(self._next(), zeros, self._params)

    def ask(self) -> FloatArray:
        with self._plain():
            asked, self._state = self._strategy.ask(self._next(), self._state, self._params)
        return np.array(asked, dtype=np.float64)

    def tell(self, vectors: FloatArray, errors: FloatArray) -> None:
        # The strategies rank; infinite errors rank last, and must stay finite for the metrics.
        finite = errors[np.isfinite(errors)]
        worst = float(finite.max()) if len(finite) else 0.0
        ranks = np.where(np.isfinite(errors), errors, worst + abs(worst) + 1.0)
        # float32 must distinguish them.
        shifted = ranks - ranks.min()
        shifted /= shifted.max() or 1.0
        with self._plain():
            numpy = self._jax.numpy
            self._state, _ = self._strategy.tell(
                self._next(),
                numpy.asarray(vectors, numpy.float32),
                numpy.asarray(shifted, numpy.float32),
                self._state,
                self._params,
            )

    def _next(self) -> Any:
        self._key, key = self._jax.random.split(self._key)
        return key

    def _plain(self) -> Any:
        """JAX's default promotion, which evosax requires, whatever the caller has set."""
        return _Promotion(self._jax)


class _Promotion:
    def __init__(self, jax: Any):
        self._contexts = (jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
