"""Mixed-integer programs in arrays, solved through PuLP.

All differences between PuLP 3 and 4 are handled in this module.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from qvla_jax.errors import InputError, QvlaError
from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray

MipStatus: TypeAlias = Literal["optimal", "time_limit", "infeasible", "failed"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The constraint `weights @ x[columns] == right`, or `<= right`.

    Attributes:
        columns: i64[k].
        weights: f64[k].
        right: the right-hand side.
        equal: False for `<=`.
    """

    columns: IntArray
    weights: FloatArray
    right: float
    equal: bool = True


@dataclasses.dataclass(frozen=True)
class Program:
    """Minimizes `costs @ x` for `0 <= x <= upper` under the rows; each column is in at least one.

    Attributes:
        costs: f64[n].
        upper: f64[n], finite.
        integer: bool[n].
        rows: the constraints.
    """

    costs: FloatArray
    upper: FloatArray
    integer: BoolArray
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the solver found.

    Attributes:
        values: f64[n], within the solver's tolerances; arbitrary if it found no solution.
        bound: bound on the least cost; -inf where the solver gives none.
        status: "optimal" (within the gap asked for), "time_limit", "infeasible", or "failed".
    """

    values: FloatArray
    bound: float
    status: MipStatus


def check_backend(backend: str) -> None:
    """Checks that there is such a solver.

    Raises:
        InputError: it is unknown or not installed.
    """
    if backend not in ("highs", "cbc"):
        raise InputError(f"backend must be 'highs' or 'cbc', got {backend!r}.")
    if backend == "cbc" and cbc_path() is None:
        raise InputError("CBC is not installed: `pip install 'pulp[cbc]'`, or use backend='highs'.")


def solve_program(
    program: Program,
    backend: str,
    *,
    start: FloatArray | None = None,
    time_limit: float | None = None,
    gap: float = 0.0,
    threads: int = 1,
) -> Answer:
    """Solves a program.

    Args:
        program: the program.
        backend: "highs" or "cbc".
        start: f64[n], a feasible solution that HiGHS improves. CBC gets none, because 2.10
            sometimes reports a start as the optimum.
        time_limit: seconds to build and to solve, or None.
        gap: relative gap at which the search may stop.
        threads: threads of the solver.

    Raises:
        InputError: the backend is unknown or not installed.
        QvlaError: the solver failed.
    """
    check_backend(backend)
    begin = time.perf_counter()
    pulp: Any = importlib.import_module("pulp")
    problem, variables = _written(pulp, program)
    # Building used part of the time.
    left = None if time_limit is None else max(0.1, time_limit - (time.perf_counter() - begin))
    options = {
        "msg": False,
        "timeLimit": left,
        "gapRel": gap,
        "gapAbs": 0.0,
        "threads": threads,
    }
    if backend == "highs":
        solver = _highs(pulp, start, **options)
    else:
        # Not PuLP 3's own class of CBC, which 3.3 deprecates.
        solver = pulp.COIN_CMD(path=cbc_path(), **options)
    try:
        outcome = problem.solve(solver)
    except pulp.PulpSolverError as error:
        raise QvlaError(f"The {backend} solver failed: {error}") from error
    values = np.array([variable.varValue for variable in variables], dtype=np.float64)
    if backend == "cbc":
        return Answer(values, -np.inf, _status_of_cbc(pulp, problem, outcome))
    bound = float(problem.solverModel.getInfo().mip_dual_bound)
    return Answer(values, bound, _status_of_highs(problem.solverModel))


def _written(pulp: Any, program: Program) -> tuple[Any, list[Any]]:
    """The program in PuLP's objects, and its variables in the order of the columns."""
    # PuLP 4 has separate names for the ways to make an expression.
    expression: Any = getattr(pulp.LpAffineExpression, "from_list", pulp.LpAffineExpression)
    problem: Any = pulp.LpProblem("allocation", pulp.LpMinimize)
    # PuLP 3 sorts the columns by name.
    digits = len(str(len(program.costs)))
    variables: list[Any] = [
        problem.add_variable(
            f"x{column:0{digits}}", 0, upper, pulp.LpInteger if integer else pulp.LpContinuous
        )
        for column, (upper, integer) in enumerate(
            zip(program.upper.tolist(), program.integer.tolist(), strict=True)
        )
    ]
    problem += expression(list(zip(variables, program.costs.tolist(), strict=True)))
    for row in program.rows:
        members = [variables[column] for column in row.columns.tolist()]
        total = expression(list(zip(members, row.weights.tolist(), strict=True)))
        problem += total == row.right if row.equal else total <= row.right
    return problem, variables


def _highs(pulp: Any, start: FloatArray | None, **options: Any) -> Any:
    """PuLP's HiGHS without its output, started from a solution."""
    base: Any = pulp.HiGHS
    methods: dict[str, Any] = {
        "createAndConfigureSolver": _create_quietly(base),
        # PuLP 4 reads the log back from a temporary file; nothing here asks for it.
        "capture_log": lambda self: contextlib.nullcontext(),  # pyright: ignore[reportUnknownLambdaType]
    }
    if start is not None:
        methods["callSolver"] = _call_from(start)
        # HiGHS 1.16 can improve a start while it presolves, report the better objective, and return
        # the start: without presolve it returns what it proved.
        options["presolve"] = "off"
    return type("QuietHiGHS", (base,), methods)(
        mip_feasibility_tolerance=1e-9,
        primal_feasibility_tolerance=1e-9,
        dual_feasibility_tolerance=1e-9,
        **options,
    )


def _create_quietly(base: Any) -> Callable[[Any, Any], None]:
    """HiGHS 1.16 prints a banner when it is created, before its output can be turned off."""

    def create(self: Any, problem: Any) -> None:
        with _stdout_closed():
            base.createAndConfigureSolver(self, problem)

    return create


@contextlib.contextmanager
def _stdout_closed() -> Generator[None]:
    """Discards what C code writes to file descriptor 1."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no standard output to protect
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _call_from(start: FloatArray) -> Callable[[Any, Any], None]:
    """Runs HiGHS from a solution, which PuLP passes on only from version 4."""

    def call(self: Any, problem: Any) -> None:
        highspy: Any = importlib.import_module("highspy")
        solution = highspy.HighsSolution()
        solution.col_value = start.tolist()
        problem.solverModel.setSolution(solution)
        problem.solverModel.run()

    return call


def _status_of_highs(model: Any) -> MipStatus:
    known: Any = importlib.import_module("highspy").HighsModelStatus
    status = model.getModelStatus()
    if status == known.kOptimal:
        return "optimal"
    # No program here is unbounded.
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):
        return "infeasible"
    stopped = (known.kTimeLimit, known.kIterationLimit, known.kInterrupt, known.kUnknown)
    return "time_limit" if status in stopped else "failed"


def cbc_path() -> str | None:
    """The CBC that is used: the package cbcbox's, the path's, or the one inside PuLP 3."""
    if importlib.util.find_spec("cbcbox") is not None:
        cbcbox: Any = importlib.import_module("cbcbox")
        return cbcbox.cbc_bin_path()
    pulp: Any = importlib.import_module("pulp")
    bundled: Any = getattr(pulp, "PULP_CBC_CMD", None)
    inside: str | None = None if bundled is None else bundled.pulp_cbc_path
    return shutil.which("cbc") or (None if inside is None else shutil.which(inside))


def _status_of_cbc(pulp: Any, problem: Any, outcome: Any) -> MipStatus:
    if hasattr(outcome, "has_solution"):  # PuLP 4
        known: Any = pulp.LpSolveStatus
        status = outcome.status
        finished = status in (known.Optimal, known.GapLimit)
        stopped = (known.TimeLimit, known.Interrupted, known.Stopped, known.NotSolved)
    else:
        status = problem.status
        finished = problem.sol_status == pulp.LpSolutionOptimal
        stopped = (pulp.LpStatusNotSolved, pulp.LpStatusOptimal)  # the latter with a gap left
        known = None
    if finished:
        return "optimal"
    if status == (pulp.LpStatusInfeasible if known is None else known.Infeasible):
        return "infeasible"
    return "time_limit" if status in stopped else "failed"
