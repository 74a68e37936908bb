"""A multiple-choice knapsack as a mixed-integer program."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from qvla_jax.solvers.arrays import BoolArray, FloatArray, IntArray
from qvla_jax.solvers.programs import MipStatus, Program, Row, check_backend, solve_program
from qvla_jax.solvers.resource import Resource

# Costs are scaled so that the largest cost that an optimal solution can contain becomes this. HiGHS
# works with absolute tolerances of about 1e-7, so it resolves costs to 1e-11 of the largest.
_COST_SCALE = 1e4


@dataclasses.dataclass(frozen=True)
class MipResult:
    """What the solver found.

    Attributes:
        choice: i64[C], or None if it found nothing that fits.
        lower_bound: proven bound on the cost, within the solver's tolerances; -inf where it gives
            none.
        status: "optimal", "time_limit", "infeasible" (no choice fits), or "failed" (no usable
            answer).
        seconds: time to build and to solve.
        variables: binary variables.
    """

    choice: IntArray | None
    lower_bound: float
    status: MipStatus
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
        budget: bytes.
        incumbent: i64[C], a feasible choice; options that cannot be part of a better one are left
            out. None if there is none.
        resources: further budgets, their tables [C, n] like the sizes.
        tiles: counts in multiples.
        slack_price: cost of every byte left unspent.
        backend: "highs" or "cbc".
        time_limit: seconds to build and to solve.
        gap: relative gap at which the search may stop.
        threads: threads of the solver.
        warm_start: hands the incumbent to HiGHS.
    """
    begin = time.perf_counter()
    check_backend(backend)
    index = np.arange(len(costs))
    open_costs = np.where(opened, costs, np.inf)
    floor = open_costs.min(axis=1)
    least = np.where(opened, sizes, np.iinfo(np.int64).max).min(axis=1)
    spare = budget - int(least.sum())
    if incumbent is None:
        highest = np.where(opened, costs, -np.inf).max(axis=1)
        ceiling = float((highest - floor).sum()) + slack_price * spare or 1.0
    else:
        used = int(sizes[index, incumbent].sum())
        ceiling = float((costs[index, incumbent] - floor).sum()) + slack_price * (budget - used)
        if ceiling <= 0:
            seconds = time.perf_counter() - begin
            return MipResult(incumbent, float(floor.sum()), "optimal", seconds, 0)
    # An option that alone costs more than the whole incumbent is in no better solution.
    useful = opened & np.less_equal(costs - floor[:, None], ceiling)
    if incumbent is not None:
        useful[index, incumbent] = True
    extra = np.where(useful, sizes - least[:, None], 0)
    unit = float(np.gcd.reduce(extra, axis=None)) or 1.0
    # The clip keeps the scale finite if all costs are nearly zero.
    ceiling = max(ceiling, 1e-300)
    scaled = np.where(useful, costs - floor[:, None], 0.0) * (_COST_SCALE / ceiling)

    # Columns: an option x[channel, option] each, the slack, and the counters of tiles.
    channel, option = np.nonzero(useful)
    cells = np.arange(len(channel))
    weights = np.append(extra[channel, option] / unit, 1.0)
    rows = [
        Row(members, np.ones(len(members)), 1.0)
        for members in np.split(cells, np.flatnonzero(np.diff(channel)) + 1)
    ]
    knapsack = Row(np.arange(len(weights)), weights, spare / unit)
    rows.append(knapsack)
    rows.extend(_within(resource, channel, option) for resource in resources)
    counters = [] if tiles is None else _counters(tiles, channel, option)
    for column, counter in enumerate(counters, start=len(weights)):
        taken = np.append(np.ones(len(counter.cells)), -float(counter.multiple))
        rows.append(Row(np.append(counter.cells, column), taken, 0.0))
    idle = slack_price * unit * _COST_SCALE / ceiling
    program = Program(
        costs=np.concatenate([scaled[channel, option], [idle], np.zeros(len(counters))]),
        upper=np.concatenate(
            [np.ones(len(cells)), [spare / unit], [counter.upper for counter in counters]]
        ),
        integer=np.arange(len(weights) + len(counters)) != len(cells),
        rows=rows,
    )
    start = None
    if incumbent is not None and warm_start:
        start = _start(incumbent, channel, option, knapsack, counters)
    # Building used part of the time.
    left = None if time_limit is None else max(0.1, time_limit - (time.perf_counter() - begin))
    answer = solve_program(program, backend, start=start, time_limit=left, gap=gap, threads=threads)

    choice = _read_choice(answer.values[: len(cells)], channel, option, useful.shape)
    if choice is not None and (
        int(sizes[index, choice].sum()) > budget
        or not bool(opened[index, choice].all())
        or any(resource.used_by(choice) > resource.limit for resource in resources)
        or not (tiles is None or tiles.hold(choice))
    ):
        choice = None  # within the solver's tolerances, but not within the budgets
    lower_bound = float(floor.sum()) + answer.bound * (ceiling / _COST_SCALE)
    status = answer.status
    if status == "optimal" and choice is None:
        status = "time_limit"
    elif status == "optimal" and choice is not None and gap == 0:
        spent = int(sizes[index, choice].sum())
        lower_bound = float(costs[index, choice].sum()) + slack_price * (budget - spent)
    return MipResult(choice, lower_bound, status, time.perf_counter() - begin, len(cells))


def _within(resource: Resource, channel: IntArray, option: IntArray) -> Row:
    """The constraint of a resource, in units of the greatest common divisor."""
    unit = int(np.gcd.reduce(resource.use, axis=None)) or 1
    use = (resource.use[channel, option] // unit).astype(np.float64)
    return Row(np.arange(len(use)), use, float(resource.limit // unit), equal=False)


@dataclasses.dataclass(frozen=True)
class _Counter:
    """A whole number: the channels of a group that take an option are `multiple` times it.

    Attributes:
        multiple: what their number is a multiple of.
        cells: i64[k], the columns of this option of these channels.
    """

    multiple: int
    cells: IntArray

    @property
    def upper(self) -> float:
        return float(len(self.cells) // self.multiple)


def _counters(tiles: Tiles, channel: IntArray, option: IntArray) -> list[_Counter]:
    found: list[_Counter] = []
    for group in np.unique(tiles.groups).tolist():
        inside = tiles.groups[channel] == group
        for taken, multiple in enumerate(tiles.multiples[group].tolist()):
            cells = np.flatnonzero(inside & (option == taken)).astype(np.int64)
            if multiple != 1 and len(cells):
                found.append(_Counter(multiple, cells))
    return found


def _start(
    incumbent: IntArray,
    channel: IntArray,
    option: IntArray,
    knapsack: Row,
    counters: Sequence[_Counter],
) -> FloatArray:
    """The incumbent as a solution of the program."""
    taken = (incumbent[channel] == option).astype(np.float64)
    slack = knapsack.right - float(knapsack.weights[:-1] @ taken)
    counts = [float(taken[counter.cells].sum()) // counter.multiple for counter in counters]
    return np.concatenate([taken, [slack], counts])


def _read_choice(
    values: FloatArray, channel: IntArray, option: IntArray, shape: tuple[int, ...]
) -> IntArray | None:
    """Every channel's option of the largest value; None where one has none above a half."""
    table = np.zeros(shape)
    table[channel, option] = np.nan_to_num(values)
    if not bool((table.max(axis=1) > 0.5).all()):
        return None
    return table.argmax(axis=1).astype(np.int64)
