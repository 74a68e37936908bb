"""Runs all solvers on one allocation problem: from a run, from a file, or synthetic."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from qvla_jax.errors import InputError
from qvla_jax.pipeline import files
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance
from qvla_jax.report.pareto import save_pareto
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.solvers import (
    AllocationProblem,
    Comparison,
    Pareto,
    available,
    compare,
    instances,
    pareto,
    settings_of,
)

_OPENVLA = "openvla"
_DEFAULT_BITS = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSolversConfig:
    """Runs the solvers on one problem and prints cost, bound, gap, bytes, seconds and status."""

    # A folder with sensitivity.safetensors, a problem file, "openvla" (synthetic, 1.85 million
    # channels), or a family of random instances such as strongly_correlated.
    problem: Annotated[str, tyro.conf.Positional]
    # Budget for a folder or "openvla" (4 by default); a problem file brings its own.
    budget_bits: float | None = None
    # Solvers to run; by default all that are installed.
    solvers: tuple[str, ...] = ()
    # Seconds for each solver with a time limit.
    time_limit: float = 50.0
    # PNG file for cost against bytes over many budgets.
    figure: Path | None = None
    # Budgets of the figure.
    budgets: int = 16
    # Channels of a random instance.
    channels: int = 10_000
    # Seed of a synthetic problem.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget_bits is not None and not 0 < self.budget_bits <= 16:
            raise InputError(f"budget_bits must lie above 0 and at most 16, got {self.budget_bits}")
        for name in ("budgets", "channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.figure is not None and self.figure.suffix != ".png":
            raise InputError(f"{self.figure}: the name must end in .png")


@dataclasses.dataclass(frozen=True)
class Compared:
    """What came out.

    Attributes:
        config: the settings.
        comparison: comparison of the solvers at the budget.
        points: points of the figure, over all budgets; None without a figure.
    """

    config: CompareSolversConfig
    comparison: Comparison
    points: Pareto | None

    def to_json(self) -> dict[str, Any]:
        """Everything but the choices, as JSON types."""
        return {
            "problem": self.config.problem,
            "summary": dataclasses.asdict(self.comparison.problem.summary()),
            "solvers": self.comparison.to_json(),
            "pareto": None if self.points is None else self.points.to_json(),
            "provenance": provenance(seed=self.config.seed),
        }


@in_32_bits
def compare_solvers(config: CompareSolversConfig, *, progress: Progress = no_progress) -> Compared:
    """Compares solvers, and writes the figure if requested.

    Raises:
        InputError: there is no such problem or solver, or a file is damaged.
        BudgetError: the budget is below the least size.
    """
    problem, weights = problem_of(config)
    names = config.solvers or available()
    limits = {
        name: {"time_limit": config.time_limit}
        for name in names
        if "time_limit" in settings_of(name)
    }
    comparison = compare(problem, names, settings=limits, progress=progress)
    points = None
    if config.figure is not None:
        points = pareto(problem, budgets=config.budgets, progress=progress)
        save_pareto(points, config.figure, weights=weights)
    return Compared(config, comparison, points)


def problem_of(config: CompareSolversConfig) -> tuple[AllocationProblem, int | None]:
    """The requested problem, and its number of quantized weights if known.

    Raises:
        InputError: there is no such problem, or a budget was given in addition to a file's own.
    """
    name, bits = config.problem, config.budget_bits
    if name == _OPENVLA:
        synthetic = instances.openvla_like(budget_bits=bits or _DEFAULT_BITS, seed=config.seed)
        return synthetic, None
    path = Path(name)
    if path.is_dir():
        table = SensitivityTable.load(files.needed(path / files.SENSITIVITY))
        problem = table.problem(budget_bits=bits or _DEFAULT_BITS)
        return problem, table.index.num_weights
    if bits is not None:
        raise InputError(
            f"{name}: budget_bits goes with a run's folder or {_OPENVLA!r}; problem files and "
            "random instances have budgets of their own"
        )
    if path.suffix in (".safetensors", ".npz"):
        return AllocationProblem.load(path), None
    if name in instances.families():
        drawn = instances.random_instance(name, channels=config.channels, seed=config.seed)
        return drawn, None
    raise InputError(
        f"{name}: neither a folder, nor a problem file (.safetensors, .npz), nor one of "
        f"{', '.join((_OPENVLA, *instances.families()))}"
    )
