"""Solvers by name: one signature in, one certified solution out."""

import dataclasses
import importlib.util
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from qvla_jax.errors import InputError, QvlaError, unknown
from qvla_jax.solvers.arrays import IntArray, frozen
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.relaxation import Relaxation, relax
from qvla_jax.solvers.solution import OPTIMALITY_TOLERANCE, Solution, Status, relative_gap


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a solver function returns; `solve` turns it into a certified `Solution`.

    Attributes:
        choice: i64[C], feasible.
        lower_bound: a bound from an exhaustive search, where the solver has one.
        status: only if the solver knows more than the gap shows.
        relaxation: the linear relaxation, if the solver has computed it anyway.
        details: facts worth reporting.
    """

    choice: IntArray
    lower_bound: float | None = None
    status: Status | None = None
    relaxation: Relaxation | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        name: `family` or `family:variant`.
        function: takes the problem and keyword settings, all with defaults.
        requires: modules that must be installed.
        handles: constraints that it supports, as `AllocationProblem.constraints` names them.
        summary: first line of the function's docstring.
    """

    name: str
    function: Callable[..., Proposal]
    requires: tuple[str, ...]
    handles: tuple[str, ...]
    summary: str

    @property
    def is_available(self) -> bool:
        """True when what the solver requires is installed."""
        return all(importlib.util.find_spec(module) is not None for module in self.requires)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given settings completed by the defaults.

        Raises:
            InputError: a setting is unknown.
        """
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        extra = sorted(given.keys() - defaults.keys())
        if extra:
            raise InputError(
                f"Solver {self.name!r} has no setting {', '.join(extra)}; it has: "
                f"{', '.join(defaults) or 'none'}."
            )
        return {**defaults, **given}


_SOLVERS: dict[str, Solver] = {}

_Function = TypeVar("_Function", bound=Callable[..., Proposal])


def register(
    name: str, *, requires: tuple[str, ...] = (), handles: tuple[str, ...] = ()
) -> Callable[[_Function], _Function]:
    """Registers a solver function under a name.

    Args:
        name: `family` or `family:variant`; new.
        requires: modules that the function imports when it runs.
        handles: constraints that it supports beyond the budget and closed options; it never gets a
            problem with others.
    """

    def decorate(function: _Function) -> _Function:
        if name in _SOLVERS:
            raise ValueError(f"There already is a solver {name!r}.")
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        _SOLVERS[name] = Solver(name, function, requires, handles, summary)
        return function

    return decorate


def available() -> tuple[str, ...]:
    """The names of the solvers that can run here, sorted."""
    return tuple(sorted(name for name, solver in _SOLVERS.items() if solver.is_available))


def describe() -> dict[str, str]:
    """One line about each available solver, by name."""
    return {name: _SOLVERS[name].summary for name in available()}


def settings_of(name: str) -> dict[str, Any]:
    """A solver's settings and their defaults.

    Raises:
        InputError: there is no such solver, or what it requires is not installed.
    """
    return get_solver(name).settings({})


def get_solver(name: str) -> Solver:
    """Looks a solver up.

    Raises:
        InputError: there is no such solver, or what it requires is not installed.
    """
    solver = _SOLVERS.get(name)
    if solver is None:
        raise InputError(unknown("solver", name, available()))
    if not solver.is_available:
        raise InputError(
            f"Solver {name!r} needs {', '.join(solver.requires)}; install it with pip."
        )
    return solver


def solve(
    problem: AllocationProblem,
    name: str = "greedy:marginal",
    *,
    relaxation: Relaxation | None = None,
    **settings: Any,
) -> Solution:
    """Solves a problem and certifies the answer.

    For every solver, the lower bound is the dual value of the linear relaxation, or a tighter one
    if an exact search proves it. `seconds` covers the solver alone.

    Args:
        problem: the problem.
        name: one of `available()`.
        relaxation: `relax(problem)`, if already computed; used for the certificate only.
        **settings: the solver's own settings.

    Returns:
        A feasible solution with its certificate.

    Raises:
        InputError: the solver or a setting is unknown, or the solver cannot take this problem.
        BudgetError: the solver has no allocation within the budget; the message states its minimum.
    """
    if relaxation is not None and relaxation.budget != problem.budget:
        raise InputError(
            f"The relaxation is for {relaxation.budget} bytes, the problem's budget is "
            f"{problem.budget}: their bounds differ."
        )
    solver = get_solver(name)
    complete = solver.settings(settings)
    check_constraints(problem, solver)
    start = time.perf_counter()
    proposal = solver.function(problem, **complete)
    seconds = time.perf_counter() - start
    return _certify(problem, solver, complete, proposal, relaxation, seconds)


def check_constraints(problem: AllocationProblem, solver: Solver) -> None:
    """Checks that a solver supports every constraint of a problem.

    Raises:
        InputError: it does not; the message names those that do.
    """
    missing = [name for name in problem.constraints if name not in solver.handles]
    if missing:
        able = [
            name for name in available() if set(problem.constraints) <= set(_SOLVERS[name].handles)
        ]
        raise InputError(
            f"Solver {solver.name!r} does not honour {' and '.join(missing)}; use "
            f"{' or '.join(able)}."
        )


def _certify(
    problem: AllocationProblem,
    solver: Solver,
    settings: Mapping[str, Any],
    proposal: Proposal,
    relaxation: Relaxation | None,
    seconds: float,
) -> Solution:
    choice = proposal.choice.astype(np.int64, copy=False)
    size = problem.size_of(choice)
    violation = problem.violation(choice)
    if violation is not None:
        raise QvlaError(
            f"Solver {solver.name!r} returned an infeasible choice: {violation}. This is a defect "
            "of the solver."
        )
    cost = problem.cost_of(choice)
    relaxation = proposal.relaxation or relaxation or relax(problem)
    lower_bound = relaxation.lower_bound
    if proposal.lower_bound is not None:
        # A search compares differently rounded sums; its bound must not pass the cost that it
        # proves optimal.
        lower_bound = max(lower_bound, min(proposal.lower_bound, cost))
    status: Status = proposal.status or "feasible"
    if relative_gap(cost, lower_bound) <= OPTIMALITY_TOLERANCE:
        status = "optimal"
    return Solution(
        choice=frozen(choice),
        cost=cost,
        size=size,
        lower_bound=lower_bound,
        seconds=seconds,
        status=status,
        solver=solver.name,
        settings={key: _as_json(value) for key, value in settings.items()},
        multiplier=relaxation.multiplier,
        prices=relaxation.prices,
        details=dict(proposal.details),
    )


def _as_json(value: Any) -> Any:
    """A setting as JSON can hold it: callables by name, arrays by shape."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, np.ndarray):
        return f"array{list(cast('NDArray[Any]', value).shape)}"
    return value
