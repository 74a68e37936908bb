"""Stage 3: choose a bit-width for every channel, for each method and budget."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvla_jax.allocation import allocate as solve_table
from qvla_jax.allocation import read_front
from qvla_jax.array_files import read_arrays, write_arrays
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.pipeline import files
from qvla_jax.pipeline.configs import AllocateConfig
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import InputStatistics, uniform_bytes
from qvla_jax.quantization.allocation import Allocation, FrontPoint
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.sensitivity.table import SensitivityTable

KIND = "qvla_jax.allocation"


@dataclasses.dataclass(frozen=True, eq=False)
class Allocations:
    """All allocations of a run.

    Attributes:
        items: the chosen one first; those read from a file have no quantizer.
        index: the layers and the order of their channels.
        made_from: policy fingerprint and calibration hash.
        front: bytes stored against bytes read, where these differ; see `allocation.read_front`.
    """

    items: tuple[Allocation, ...]
    index: ChannelIndex
    made_from: Mapping[str, str]
    front: tuple[FrontPoint, ...] = ()

    @property
    def chosen(self) -> Allocation:
        """The run's result."""
        return self.items[0]

    def at(self, budget: str) -> Allocation:
        """The allocation of the run's own method and solver at another budget, by name.

        Raises:
            InputError: the run has none.
        """
        chosen = self.chosen
        own = {
            item.budget: item
            for item in self.items
            if not item.baseline and item.solver == chosen.solver
        }
        if budget not in own:
            raise InputError(
                f"the run has no allocation at the budget {budget!r}, only at {', '.join(own)}; "
                "see --sweep and --match-uniform of `qvla allocate`"
            )
        return own[budget]

    def save(self, path: Path) -> None:
        """Writes one file with the bits of every allocation."""
        arrays = {f"bits.{i}": a.bits.astype(np.uint8) for i, a in enumerate(self.items)}
        described = [a.describe() for a in self.items]
        layers = [dataclasses.asdict(layer) for layer in self.index.layers]
        header = {
            "allocations": described,
            "layers": layers,
            "made_from": self.made_from,
            "front": [dataclasses.asdict(point) for point in self.front],
        }
        write_arrays(path, arrays, header, kind=KIND)

    @classmethod
    def load(cls, path: Path) -> "Allocations":
        """Reads a file written by `save`.

        Raises:
            InputError: it is missing, damaged or of another kind.
        """
        arrays, header = read_arrays(files.needed(path), kind=KIND, required=("bits.0",))
        try:
            index = ChannelIndex(tuple(LayerInfo(**_checked(n, _LAYER)) for n in header["layers"]))
            items = tuple(
                Allocation(
                    bits=arrays[f"bits.{i}"].astype(np.int64), index=index, quantizer=None,
                    **_checked(raw, _ALLOCATION),
                )
                for i, raw in enumerate(header["allocations"])
            )  # fmt: skip
            made_from = dict(header["made_from"])
            # Files of earlier versions have none.
            front = tuple(FrontPoint(**_checked(p, _POINT)) for p in header.get("front", ()))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: damaged allocation file ({error})") from error
        except InputError as error:
            raise InputError(f"{path}: {error}; run `qvla allocate` again") from error
        if not items:
            raise InputError(f"{path}: no allocation in it; run `qvla allocate` again")
        return cls(items, index, made_from, front)


@in_32_bits
def allocate(config: AllocateConfig, *, progress: Progress = no_progress) -> Allocations:
    """Solves for every sensitivity table in the folder, every solver and every budget.

    The solvers beyond the first run only on the main table, and at the budgets of the sweep only if
    the settings are thorough; the other tables are baselines of the sensitivity, with the same
    allocator.

    Raises:
        BudgetError: even the smallest option of every channel exceeds the budget.
        InputError: a table is missing or damaged, a solver's name is unknown, or a pattern of
            `minimum_bits` matches no layer.
    """
    tables = load_tables(config.out)
    main = tables[0]
    jobs = [(table, solver) for table in tables for solver in config.solvers]
    jobs = [(t, s) for t, s in jobs if t is main or s == config.solvers[0]]
    swept = jobs if config.thorough else [(t, s) for t, s in jobs if s == config.solvers[0]]
    least = config.minimum_bits
    # Check that the budget is feasible before any work.
    read = config.budget_read
    main.problem(budget_bits=config.budget_bits, budget_read=read, minimum_bits=least)
    sweep = [bits for bits in sorted(config.sweep) if bits != config.budget_bits]
    work = [(config.budget_bits, job) for job in jobs] + [(b, job) for b in sweep for job in swept]
    items: list[Allocation] = []
    total = len(work) + len(config.match_uniform)
    for done, (bits, (table, solver)) in enumerate(work):
        progress("allocate", done, total)
        try:
            found = solve_table(
                table,
                budget_bits=bits,
                # Other budgets are those of bytes stored alone.
                budget_read=read if bits == config.budget_bits else None,
                minimum_bits=least,
                solver=solver,
            )
            items.append(dataclasses.replace(found, baseline=table is not main))
        except BudgetError:
            if bits == config.budget_bits:
                raise
            # A budget of the sweep that is too small has no point on the curve.
    for uniform in config.match_uniform:
        with contextlib.suppress(BudgetError):
            items.append(_matched(main, config.solvers[0], uniform, least))
    progress("allocate", total, total)
    front = read_front(main, (config.budget_bits, *sweep), minimum_bits=least)
    allocations = Allocations(tuple(items), main.index, files.made_from(main), front)
    allocations.save(config.out / files.ALLOCATION)
    return allocations


def load_tables(folder: Path) -> list[SensitivityTable]:
    """Loads the main sensitivity table and its baselines, and checks that they belong together."""
    path = files.needed(folder / files.SENSITIVITY)
    statistics = InputStatistics.load(files.needed(folder / files.STATISTICS))
    tables = [SensitivityTable.load(path, statistics=statistics)]
    found = {"calibration hash": statistics.made_from.get("calibration")}
    expected = {"calibration hash": tables[0].provenance["calibration"]}
    remedy = f"run `qvla sensitivity --out {folder}` again"
    files.check_same(folder / files.STATISTICS, found, expected, remedy=remedy)
    for path in sorted(folder.glob("sensitivity_*.safetensors")):
        table = SensitivityTable.load(path)
        made_from = files.made_from(tables[0])
        files.check_same(path, files.made_from(table), made_from, remedy=f"{remedy}, or delete it")
        tables.append(table)
    return tables


def _matched(
    table: SensitivityTable, solver: str, uniform: int, least: Mapping[str, int]
) -> Allocation:
    """Allocates exactly the bytes that a uniform grid stores."""
    size = uniform_bytes(table.index, uniform)
    found = solve_table(table, budget_bytes=size, minimum_bits=least, solver=solver)
    return dataclasses.replace(found, matches=uniform)


# A file's entries for a layer and for an allocation, as JSON types.
_LAYER: Final[Mapping[str, Any]] = {
    "path": str,
    "has_bias": bool,
    **dict.fromkeys(("out_features", "fan_in", "source_bytes"), int),
}
_ALLOCATION: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("sensitivity", "solver"), str),
    **dict.fromkeys(("budget_bytes", "stored_bytes"), int),
    "baseline": bool,
    **dict.fromkeys(("matches", "read_bytes"), int | None),
    "budget_read": int | float | None,
    **dict.fromkeys(
        ("budget_bits", "predicted_sse_normalized", "lower_bound", "seconds"), int | float
    ),
}
_POINT: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("budget_bits", "cost"), int | float),
    **dict.fromkeys(("stored_bytes", "read_bytes"), int),
}


def _checked(raw: Mapping[str, Any], kinds: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if not isinstance(value, kinds.get(key, object)):
            raise TypeError(f"{key}: {value!r}")
        if isinstance(value, int):
            float(value)  # JSON's integers may be too large
    return raw
