"""All solvers on one problem, on equal terms."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from qvla_jax.errors import QvlaError
from qvla_jax.solvers.arrays import Progress, no_progress
from qvla_jax.solvers.problem import AllocationProblem
from qvla_jax.solvers.registry import available, get_solver, solve
from qvla_jax.solvers.relaxation import relax
from qvla_jax.solvers.solution import Solution


@dataclasses.dataclass(frozen=True)
class Row:
    """One solver's line of a comparison.

    Attributes:
        label: the solver's name and settings.
        solution: its solution; None if it could not solve the problem.
        error: why it could not.
    """

    label: str
    solution: Solution | None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The solutions of several solvers; `str()` gives the table."""

    problem: AllocationProblem
    rows: tuple[Row, ...]

    @property
    def lower_bound(self) -> float:
        """The tightest bound that any of the solvers proved."""
        return max(
            (row.solution.lower_bound for row in self.rows if row.solution), default=float("-inf")
        )

    def to_json(self) -> list[dict[str, Any]]:
        """One record for each solver, without the choices."""
        return [
            {
                "label": row.label,
                "error": row.error,
                **(row.solution.to_json() if row.solution else {}),
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.problem.channels:,} channels x {self.problem.options} options, budget "
            f"{self.problem.budget:,} bytes, best lower bound {self.lower_bound:.9g}",
            f"{'solver':<24} {'cost':>15} {'bound':>15} {'gap':>9} {'bytes':>16} {'seconds':>9}"
            "  status",
        ]
        for row in self.rows:
            if row.solution is None:
                lines.append(f"{row.label:<24} {row.error}")
                continue
            s = row.solution
            lines.append(
                f"{row.label:<24} {s.cost:>15.9g} {s.lower_bound:>15.9g} {s.gap:>9.2e} "
                f"{s.size:>16,} {s.seconds:>9.3f}  {s.status}"
            )
        return "\n".join(lines)


def compare(
    problem: AllocationProblem,
    names: Iterable[str] | None = None,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Runs several solvers on one problem.

    Each solver's seconds include all of its own work; the bound that certifies the heuristics is
    computed once. A solver that cannot handle the problem (too large a table, no uniform option
    that fits) becomes a row with its reason.

    Args:
        problem: the problem.
        names: names from `available()`; None for all of them.
        settings: settings for solvers, by name.
        progress: called with the solvers done.

    Raises:
        InputError: a name or a setting is unknown.
    """
    chosen = tuple(available() if names is None else names)
    given = settings or {}
    for name in (*chosen, *given):
        get_solver(name).settings(given.get(name, {}))
    relaxation = relax(problem)
    rows: list[Row] = []
    for done, name in enumerate(chosen):
        progress("solvers", done, len(chosen))
        try:
            rows.append(
                Row(name, solve(problem, name, relaxation=relaxation, **given.get(name, {})))
            )
        except QvlaError as error:
            rows.append(Row(name, None, str(error)))
    progress("solvers", len(chosen), len(chosen))
    return Comparison(problem, tuple(rows))
