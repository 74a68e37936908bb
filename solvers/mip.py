"""A multiple-choice knapsack as a mixed-integer program, solved through PuLP."""

import contextlib
import dataclasses
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qvla_jax.errors import InputError, QvlaError
from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray
from qvla_jax.solvers.resource import Resource

# Units in which the costs reach the solver: the largest cost that an optimal solution can contain
# becomes this. HiGHS works with absolute tolerances of about 1e-7, so that costs are told apart to
# 1e-11 of that largest one.
_COST_SCALE = 1e4


@dataclasses.dataclass(frozen=True)
class MipResult:
    """What the solver found.

    Attributes:
        choice: i64[C], or None where it found nothing that fits.
        lower_bound: Proven bound on the cost, within the solver's tolerances; -inf where it gives
            none.
        status: "optimal", "time_limit", "infeasible" (no choice fits), or "failed" (no usable
            answer).
        seconds: Time to build and to solve.
        variables: Binary variables.
    """

    choice: IntArray | None
    lower_bound: float
    status: Literal["optimal", "time_limit", "infeasible", "failed"]
    seconds: float
    variables: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Counts per group and option in multiples.

    Attributes:
        groups: i64[C].
        multiples: i64[G, n], of each group's options; 1 leaves one free.
    """

    groups: IntArray
    multiples: IntArray

    def hold(self, choice: IntArray) -> bool:
        """True when every count of a choice i64[C] is a multiple."""
        counts = np.zeros_like(self.multiples)
        np.add.at(counts, (self.groups, choice), 1)
        return not bool((counts % self.multiples).any())


def solve_mip(
    costs: FloatArray,
    sizes: IntArray,
    opened: BoolArray,
    budget: int,
    *,
    incumbent: IntArray | None,
    resources: Sequence[Resource] = (),
    tiles: Tiles | None = None,
    slack_price: float = 0.0,
    backend: str = "highs",
    time_limit: float | None = None,
    gap: float = 0.0,
    threads: int = 1,
    warm_start: bool = True,
) -> MipResult:
    """Minimizes `sum(costs) + slack_price * (budget - sum(sizes))` over the open options.

    Args:
        costs: f64[C, n].
        sizes: i64[C, n].
        opened: bool[C, n]; at least one option of every channel.
        budget: Bytes.
        incumbent: i64[C], a feasible choice; options that cannot be part of a better one are left
            out. None where none is known.
        resources: Further budgets, their tables [C, n] like the sizes.
        tiles: Counts in multiples.
        slack_price: Cost of every byte left unspent.
        backend: "highs" or "cbc".
        time_limit: Seconds to build and to solve.
        gap: Relative gap at which the search may stop.
        threads: Threads of the solver.
        warm_start: Hands the incumbent to HiGHS.
    """
    if backend not in ("highs", "cbc"):
        raise InputError(f"backend must be 'highs' or 'cbc', got {backend!r}.")
    start = time.perf_counter()
    pulp: Any = importlib.import_module("pulp")
    rows = np.arange(len(costs))
    open_costs = np.where(opened, costs, np.inf)
    floor = open_costs.min(axis=1)
    least = np.where(opened, sizes, np.iinfo(np.int64).max).min(axis=1)
    spare = budget - int(least.sum())
    if incumbent is None:
        highest = np.where(opened, costs, -np.inf).max(axis=1)
        ceiling = float((highest - floor).sum()) + slack_price * spare or 1.0
    else:
        used = int(sizes[rows, incumbent].sum())
        ceiling = float((costs[rows, incumbent] - floor).sum()) + slack_price * (budget - used)
        if ceiling <= 0:
            seconds = time.perf_counter() - start
            return MipResult(incumbent, float(floor.sum()), "optimal", seconds, 0)
    # An option that alone costs more than the whole incumbent is in no better solution.
    useful = opened & np.less_equal(costs - floor[:, None], ceiling)
    if incumbent is not None:
        useful[rows, incumbent] = True
    extra = np.where(useful, sizes - least[:, None], 0)
    unit = float(np.gcd.reduce(extra, axis=None)) or 1.0
    # The clip keeps the scale finite where all costs are next to nothing.
    ceiling = max(ceiling, 1e-300)
    scaled = np.where(useful, costs - floor[:, None], 0.0) * (_COST_SCALE / ceiling)

    problem: Any = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables: dict[tuple[int, int], Any] = {}
    by_channel: list[list[Any]] = [[] for _ in rows]
    for c, j in np.argwhere(useful).tolist():
        variable = _binary(pulp, problem, f"x_{c}_{j}")
        variables[c, j] = variable
        by_channel[c].append(variable)
    slack = _bounded(pulp, problem, "slack", spare / unit)
    objective = [(x, float(scaled[key])) for key, x in variables.items()]
    if slack_price > 0:
        objective.append((slack, slack_price * unit * _COST_SCALE / ceiling))
    problem += pulp.LpAffineExpression(objective)
    for members in by_channel:
        problem += pulp.LpAffineExpression([(x, 1) for x in members]) == 1
    weights = [(x, float(extra[key]) / unit) for key, x in variables.items()]
    problem += pulp.LpAffineExpression([*weights, (slack, 1.0)]) == spare / unit

    for resource in resources:
        problem += _within(pulp, variables, resource)
    counters = {} if tiles is None else _add_tiles(pulp, problem, variables, tiles)

    # CBC 2.10 now and then takes a start for the optimum.
    warm = warm_start and incumbent is not None and backend == "highs"
    if incumbent is not None and warm:
        for (c, j), variable in variables.items():
            variable.setInitialValue(int(incumbent[c] == j))
        slack.setInitialValue((budget - int(sizes[rows, incumbent].sum())) / unit)
        for counter, (members, option, multiple) in counters.items():
            counter.setInitialValue(int((incumbent[members] == option).sum()) // multiple)
    # Building took its share of the time.
    left = None if time_limit is None else max(0.1, time_limit - (time.perf_counter() - start))
    solver = _backend(pulp, backend, time_limit=left, gap=gap, threads=threads, warm=warm)
    try:
        problem.solve(solver)
    except pulp.PulpSolverError as error:
        raise QvlaError(f"The {backend} solver failed: {error}") from error

    choice = _read_choice(variables, len(costs))
    if choice is not None and (
        int(sizes[rows, choice].sum()) > budget
        or not bool(opened[rows, choice].all())
        or any(resource.used_by(choice) > resource.limit for resource in resources)
        or not (tiles is None or tiles.hold(choice))
    ):
        choice = None  # within the solver's tolerances, but not within the budgets
    finished = problem.sol_status == pulp.LpSolutionOptimal
    if backend == "highs":
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
        lower_bound = float(floor.sum()) + bound * (ceiling / _COST_SCALE)
    else:
        lower_bound = -np.inf
    if finished and choice is not None and gap == 0:
        spent = int(sizes[rows, choice].sum())
        lower_bound = float(costs[rows, choice].sum()) + slack_price * (budget - spent)
    status = "optimal" if finished and choice is not None else "time_limit"
    if problem.status == pulp.LpStatusInfeasible:
        status = "infeasible"
    elif problem.status not in (pulp.LpStatusOptimal, pulp.LpStatusNotSolved):
        status = "failed"
    return MipResult(choice, lower_bound, status, time.perf_counter() - start, len(variables))


def _within(pulp: Any, variables: Mapping[tuple[int, int], Any], resource: Resource) -> Any:
    """The constraint of a resource, in units of the greatest common divisor."""
    unit = int(np.gcd.reduce(resource.use, axis=None)) or 1
    terms = [(x, float(resource.use[key] // unit)) for key, x in variables.items()]
    return pulp.LpAffineExpression(terms) <= float(resource.limit // unit)


def _add_tiles(
    pulp: Any, problem: Any, variables: Mapping[tuple[int, int], Any], tiles: Tiles
) -> dict[Any, tuple[IntArray, int, int]]:
    """Whole-numbered counters: the channels of a group at an option are `multiple` times one."""
    counters: dict[Any, tuple[IntArray, int, int]] = {}
    for group in np.unique(tiles.groups).tolist():
        members = np.flatnonzero(tiles.groups == group).astype(np.int64)
        channels = members.tolist()
        for option, multiple in enumerate(tiles.multiples[group].tolist()):
            taken = [(variables[c, option], 1.0) for c in channels if (c, option) in variables]
            if multiple == 1 or not taken:
                continue
            counter = _integer(pulp, problem, f"tiles_{group}_{option}", len(taken) // multiple)
            problem += pulp.LpAffineExpression([*taken, (counter, -float(multiple))]) == 0
            counters[counter] = members, option, multiple
    return counters


def _integer(pulp: Any, problem: Any, name: str, upper: int) -> Any:
    # PuLP 3.3 deprecates the constructor that older versions need.
    if hasattr(problem, "add_variable"):
        return problem.add_variable(name, 0, upper, pulp.LpInteger)
    return pulp.LpVariable(name, 0, upper, pulp.LpInteger)


def _binary(pulp: Any, problem: Any, name: str) -> Any:
    return _integer(pulp, problem, name, 1)


def _bounded(pulp: Any, problem: Any, name: str, upper: float) -> Any:
    if hasattr(problem, "add_variable"):
        return problem.add_variable(name, 0, upper, pulp.LpContinuous)
    return pulp.LpVariable(name, 0, upper, pulp.LpContinuous)


def _backend(
    pulp: Any, backend: str, *, time_limit: float | None, gap: float, threads: int, warm: bool
) -> Any:
    if backend == "cbc":
        return _cbc(
            pulp,
            msg=False,
            timeLimit=time_limit,
            gapRel=gap,
            gapAbs=0.0,
            threads=threads,
        )
    base: Any = pulp.HiGHS
    methods = {
        "createAndConfigureSolver": _create_quietly(base),
        "callSolver": _call_warm if warm else base.callSolver,
    }
    return type("QuietHiGHS", (base,), methods)(
        msg=False,
        timeLimit=time_limit,
        gapRel=gap,
        gapAbs=0.0,
        threads=threads,
        mip_feasibility_tolerance=1e-9,
        primal_feasibility_tolerance=1e-9,
        dual_feasibility_tolerance=1e-9,
    )


def _cbc(pulp: Any, **options: Any) -> Any:
    """CBC from the path, or the copy that PuLP brings along up to version 3."""
    for name in ("COIN_CMD", "PULP_CBC_CMD"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            solver: Any = getattr(pulp, name)(**options) if hasattr(pulp, name) else None
        if solver is not None and solver.available():
            return solver
    raise InputError("CBC is not installed: `pip install 'pulp[cbc]'`, or use backend='highs'.")


def _create_quietly(base: Any) -> Callable[[Any, Any], None]:
    """HiGHS 1.16 prints a banner when it is created, before its output can be turned off."""

    def create(self: Any, problem: Any) -> None:
        with _stdout_closed():
            base.createAndConfigureSolver(self, problem)

    return create


@contextlib.contextmanager
def _stdout_closed() -> Generator[None]:
    """Sends what C code writes to file descriptor 1 nowhere."""
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


def _call_warm(self: Any, problem: Any) -> None:
    """Runs HiGHS from the variables' initial values, which PuLP itself does not hand over."""
    highspy: Any = importlib.import_module("highspy")
    solution = highspy.HighsSolution()
    solution.col_value = [float(variable.varValue or 0.0) for variable in problem.variables()]
    problem.solverModel.setSolution(solution)
    # HiGHS 1.16 can improve a start while it presolves, report the better objective, and return
    # the start: without presolve what it returns is what it proved.
    problem.solverModel.setOptionValue("presolve", "off")
    problem.solverModel.run()


def _read_choice(variables: dict[tuple[int, int], Any], channels: int) -> IntArray | None:
    choice = np.full(channels, -1, dtype=np.int64)
    largest = np.full(channels, 0.5)
    for (channel, option), variable in variables.items():
        value = variable.varValue
        if value is not None and value > largest[channel]:
            choice[channel], largest[channel] = option, value
    return choice if bool((choice >= 0).all()) else None
