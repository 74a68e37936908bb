"""A solver's answer with its certificate."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from qvla_jax.array_files import read_arrays, write_arrays
from qvla_jax.errors import InputError
from qvla_jax.solvers.arrays import IntArray, frozen

_FORMAT = "qvla_jax.allocation_solution"

Status = Literal["optimal", "feasible", "time_limit"]

# Below this relative gap a solution counts as optimal: the resolution of float64 sums of millions
# of costs.
OPTIMALITY_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """A feasible allocation and what is known about its distance from the optimum.

    Attributes:
        choice: i64[C], the option of each channel.
        cost: the summed cost of the choice.
        size: its summed bytes; at most the problem's budget.
        lower_bound: no feasible allocation costs less than this.
        seconds: wall-clock time of the solver, without the certificate.
        status: "optimal" (the gap is below `OPTIMALITY_TOLERANCE`, or an exact search ended),
            "time_limit" (an exact search was cut short) or "feasible".
        solver: the registered name of the solver.
        settings: the settings it ran with, defaults included.
        multiplier: a Lagrange multiplier in cost per byte, from which a lower bound can be
            recomputed.
        prices: the same for each of the problem's resources, in cost per unit; empty if the bound
            ignores them.
        details: further facts that the solver reports, by name.
    """

    choice: IntArray
    cost: float
    size: int
    lower_bound: float
    seconds: float
    status: Status
    solver: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    multiplier: float = 0.0
    prices: tuple[float, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def gap(self) -> float:
        """Relative gap: (cost - lower_bound) / max(|cost|, |lower_bound|), 0 where both are 0."""
        return relative_gap(self.cost, self.lower_bound)

    def counts(self, options: int) -> IntArray:
        """i64[n], how many channels take each of the n options."""
        return np.bincount(self.choice, minlength=options).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Everything but the choice, as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["choice"]
        fields |= {"settings": dict(self.settings), "details": dict(self.details)}
        return json.loads(json.dumps({**fields, "gap": self.gap}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the solution to a `.safetensors` or `.npz` file, completely or not at all."""
        write_arrays(path, {"choice": self.choice}, self.to_json(), kind=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Solution":
        """Reads a solution written by `save`.

        Raises:
            InputError: the file is missing, damaged or of another kind.
        """
        arrays, header = read_arrays(path, kind=_FORMAT, required=("choice",))
        names = {field.name for field in dataclasses.fields(cls)} - {"choice"}
        missing = sorted(names - header.keys())
        if missing:
            raise InputError(f"{os.fspath(path)}: the header lacks {missing}.")
        choice = frozen(arrays["choice"].astype(np.int64))
        header["prices"] = tuple(header["prices"])
        return cls(choice=choice, **{name: header[name] for name in names})


def relative_gap(cost: float, lower_bound: float) -> float:
    """The gap of `Solution.gap`."""
    scale = max(abs(cost), abs(lower_bound))
    return 0.0 if scale == 0 else max(0.0, (cost - lower_bound) / scale)
