"""Searches with an objective that is not a sum of costs: a measured error or latency."""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import FloatArray, IntArray
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import solve

# i64[p, C] candidates -> f64[p], what each measures; NaN counts as infinite. Deterministic.
Objective: TypeAlias = Callable[[IntArray], FloatArray]


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        choice: i64[C], feasible; the start itself if nothing measured better.
        error: its objective value.
        start_error: the start's objective value; `error` is never larger.
        evaluations: candidates measured.
        history: f64[r], the least error after each round, the start included.
        seconds: wall-clock time.
    """

    choice: IntArray
    error: float
    start_error: float
    evaluations: int
    history: FloatArray
    seconds: float


def inner_solver(problem: AllocationProblem) -> str:
    """The heuristic that supports a problem's constraints."""
    if not problem.constraints:
        return "greedy:marginal"
    able = {"resources": "lagrangian", "multiples": "greedy:aligned"}
    return able[problem.constraints[0]] if len(problem.constraints) == 1 else "ilp"


class Search:
    """The best choice so far, beginning with the start; measures no candidate twice."""

    def __init__(
        self, problem: AllocationProblem, evaluate: Objective, start: IntArray | None, inner: str
    ):
        """Measures the start.

        Args:
            problem: every candidate is feasible for it.
            evaluate: the objective.
            start: i64[C]; None solves the problem with `inner`.
            inner: a registered solver.

        Raises:
            InputError: the start is infeasible, or its error is not finite.
        """
        self._began = time.perf_counter()
        self._problem, self._evaluate = problem, evaluate
        self._known: dict[bytes, float] = {}
        self.choice = solve(problem, inner).choice if start is None else np.asarray(start)
        self.choice = self.choice.astype(np.int64)
        if self.choice.shape != (problem.channels,):
            raise InputError(
                f"start must choose for {problem.channels} channels, got {self.choice.shape}."
            )
        broken = problem.violation(self.choice)
        if broken is not None:
            raise InputError(f"The start is no feasible choice: {broken}.")
        self.error = float(self.measure([self.choice])[0])
        if not np.isfinite(self.error):
            raise InputError(f"The objective gives {self.error} for the start.")
        self._start_error, self._history = self.error, [self.error]

    def measure(self, candidates: list[IntArray]) -> FloatArray:
        """f64[p], errors of feasible candidates; NaN becomes infinite.

        Raises:
            InputError: the objective returns another shape.
        """
        keys = [_digest(candidate) for candidate in candidates]
        new = {
            key: candidate
            for key, candidate in zip(keys, candidates, strict=True)
            if key not in self._known
        }
        if new:
            errors = np.asarray(self._evaluate(np.stack(list(new.values()))), dtype=np.float64)
            if errors.shape != (len(new),):
                raise InputError(
                    f"The objective must return {len(new)} errors, got shape {errors.shape}."
                )
            self._known |= zip(
                new, np.where(np.isnan(errors), np.inf, errors).tolist(), strict=True
            )
        return np.array([self._known[key] for key in keys])

    def advance(self, candidates: list[IntArray]) -> FloatArray:
        """Measures a round of candidates, and keeps the best if it is better."""
        errors = self.measure(candidates) if candidates else np.empty(0)
        if len(errors) and float(errors.min()) < self.error:
            best = int(errors.argmin())
            self.choice, self.error = candidates[best].astype(np.int64), float(errors[best])
        self._history.append(self.error)
        return errors

    def result(self) -> SearchResult:
        """What was found."""
        return SearchResult(
            choice=self.choice,
            error=self.error,
            start_error=self._start_error,
            evaluations=len(self._known),
            history=np.array(self._history),
            seconds=time.perf_counter() - self._began,
        )


def _digest(choice: IntArray) -> bytes:
    """Identifies a candidate; storing the candidates themselves would fill memory at full size."""
    return hashlib.blake2b(choice.astype(np.int16).tobytes(), digest_size=16).digest()
