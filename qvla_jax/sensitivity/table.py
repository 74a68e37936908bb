"""`SensitivityTable`: the cost of every channel under every option, in action error and bytes."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from qvla_jax.array_files import read_arrays, write_arrays
from qvla_jax.array_typing import Float, Int
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import BITS, SOURCE
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.quantizer import Quantizer, QuantizerSettings
from qvla_jax.quantization.statistics import InputStatistics
from qvla_jax.solvers import AllocationProblem, Resource

_KIND = "qvla_jax.sensitivity_table"


class Chosen(Protocol):
    """What `bits_of` needs from a solver's solution."""

    @property
    def choice(self) -> Int[np.ndarray, " C"]:
        """The option of each channel."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityTable:
    """Costs and sizes of C channels under n options.

    Invariants: costs are finite, not negative, and exactly 0 at 16 bits; `costs`, `sizes` and
    `standard_error` are [C, n] with C = len(index) and n = len(bits).
    """

    # Mean over calibration frames of the squared error of the normalized action chunk, summed over
    # its entries that the robot executes, when this channel alone is quantized. `input_hessian` has
    # its own unit.
    costs: Float[np.ndarray, "C n"]
    # Bytes actually stored (quantization.layout).
    sizes: Int[np.ndarray, "C n"]
    bits: tuple[int, ...]
    index: ChannelIndex
    method: str
    # JSON object: policy fingerprint, calibration hash and manifest, seed, versions, settings.
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The quantizer that the costs refer to.
    settings: QuantizerSettings = dataclasses.field(default_factory=QuantizerSettings)
    # For each option, by how much the joint error of many channels exceeds the sum of their costs
    # (sensitivity.joint); None if not measured.
    joint: tuple[float, ...] | None = None
    # How often a call of the policy reads each layer's weights (`Layout.reads_of`); None: once.
    reads: tuple[int, ...] | None = None
    # Standard error of the mean over frames; None if the method has none.
    standard_error: Float[np.ndarray, "C n"] | None = None
    # Statistics of the layers' inputs, as that quantizer needs them. They are large and not part of
    # the table's file; None in a table loaded without them.
    statistics: InputStatistics | None = None

    def __post_init__(self) -> None:
        shape = (len(self.index), len(self.bits))
        bad = [b for b in self.bits if b not in BITS]
        if bad or len(set(self.bits)) != len(self.bits) or not self.bits:
            raise InputError(f"bits: expected distinct options out of {BITS}, got {self.bits}")
        for name in ("costs", "sizes", "standard_error"):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise InputError(f"{name}: expected shape {shape}, got {array.shape}")
            if not np.isfinite(array).all() or (array < 0).any():
                row = int(np.argwhere(~np.isfinite(array) | (array < 0))[0][0])
                raise InputError(
                    f"{name}: {self.index.name(row)} holds {array[row].tolist()}; expected finite "
                    "numbers that are not negative"
                )
        if not np.issubdtype(self.sizes.dtype, np.integer):
            raise InputError(f"sizes: expected integers, got {self.sizes.dtype}")
        if SOURCE in self.bits and self.costs[:, self.bits.index(SOURCE)].any():
            raise InputError("costs: 16 bits leave a channel as it is, so their cost must be 0")
        if self.joint is not None and not (
            len(self.joint) == len(self.bits) and all(1 <= f < np.inf for f in self.joint)
        ):
            raise InputError(f"joint: expected {len(self.bits)} factors from 1, got {self.joint}")
        if self.reads is not None and not (
            len(self.reads) == len(self.index.layers) and all(n >= 0 for n in self.reads)
        ):
            raise InputError(
                f"reads: expected {len(self.index.layers)} numbers from 0, got {self.reads}"
            )
        if self.statistics is not None:
            self.statistics.check(self.index, covariances=self.settings.rounding == "feedback")

    @functools.cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer that the costs belong to.

        Raises:
            InputError: the table was loaded without the statistics that it needs.
        """
        return Quantizer(self.settings, self.statistics)

    @property
    def can_quantize(self) -> bool:
        """Whether the table has what its `quantizer` needs."""
        return self.statistics is not None or not self.settings.needs_statistics

    @property
    def action_weights(self) -> Float[np.ndarray, " a"] | None:
        """What the costs weigh the entries of an action with; None: all equally."""
        weights = self.provenance.get("settings", {}).get("action_weights")
        return None if weights is None else np.asarray(weights, np.float32)

    @property
    def executed_steps(self) -> int | None:
        """Actions of a chunk that the costs count, from the first; None: all."""
        return self.provenance.get("settings", {}).get("executed_steps")

    @property
    def joint_costs(self) -> Float[np.ndarray, "C n"]:
        """Costs that add up: each option's cost times its joint factor."""
        return self.costs if self.joint is None else self.costs * np.asarray(self.joint)

    @functools.cached_property
    def reads_of_channels(self) -> Int[np.ndarray, " C"]:
        """How often a call of the policy reads each channel's weights."""
        reads = (1,) * len(self.index.layers) if self.reads is None else self.reads
        return np.asarray(reads, np.int64)[self.index.layer_of]

    @property
    def read_sizes(self) -> Int[np.ndarray, "C n"]:
        """Bytes that a call of the policy reads for each option."""
        return self.sizes * self.reads_of_channels[:, None]

    @property
    def weights_read(self) -> int:
        """Weights that a call of the policy reads, each counted as often as it is read."""
        fan_in = np.asarray([layer.fan_in for layer in self.index.layers])[self.index.layer_of]
        return int(fan_in @ self.reads_of_channels)

    def problem(
        self,
        *,
        budget_bits: float | None = None,
        budget_bytes: int | None = None,
        budget_read: float | None = None,
        minimum_bits: Mapping[str, int] | None = None,
    ) -> AllocationProblem:
        """The allocation problem under a budget; give one of the two.

        Further constraints: `dataclasses.replace(problem, resources=..., multiples=..., ...)`.

        Args:
            budget_bits: bits per quantized weight, counting everything stored (scales, biases,
                permutation, padding).
            budget_bytes: the same in bytes.
            budget_read: a second budget: bits per weight that a call of the policy reads, each
                counted as often as it is read; None: any.
            minimum_bits: regular expression (`re.match` on the path) -> minimum bits of the layers
                that it matches; if several match, the largest.

        Raises:
            BudgetError: the smallest options exceed the budget.
            InputError: none or both budgets are given, or `minimum_bits` has a pattern that matches
                no layer, or bits that are not an option.
        """
        if (budget_bits is None) == (budget_bytes is None):
            raise InputError("give either budget_bits or budget_bytes")
        if budget_bits is not None:
            if not np.isfinite(budget_bits) or budget_bits <= 0:
                raise InputError(f"budget_bits: expected a positive number, got {budget_bits}")
            budget_bytes = int(budget_bits * self.index.num_weights / 8)
        assert budget_bytes is not None
        resources: tuple[Resource, ...] = ()
        if budget_read is not None:
            if not np.isfinite(budget_read) or budget_read <= 0:
                raise InputError(f"budget_read: expected a positive number, got {budget_read}")
            limit = int(budget_read * self.weights_read / 8)
            resources = (Resource("bytes that a call reads", self.read_sizes, limit),)
        return AllocationProblem(
            costs=self.joint_costs,
            sizes=self.sizes,
            budget=budget_bytes,
            groups=self.index.layer_of.astype(np.int64),
            group_names=self.index.paths,
            minimums=self._minimums(minimum_bits) if minimum_bits else None,
            resources=resources,
        )

    def _minimums(self, minimum_bits: Mapping[str, int]) -> Int[np.ndarray, " L"]:
        """The smallest option open to each layer."""
        if list(self.bits) != sorted(self.bits):
            raise InputError(
                f"minimum_bits needs options in rising order, the table has {self.bits}"
            )
        minimums = np.zeros(len(self.index.layers), np.int64)
        for pattern, bits in minimum_bits.items():
            if bits not in self.bits:
                raise InputError(f"minimum_bits: {pattern!r}: {bits} is none of {self.bits}")
            try:
                matched = [re.match(pattern, path) is not None for path in self.index.paths]
            except re.error as error:
                raise InputError(f"minimum_bits: {pattern!r}: {error}") from error
            if not any(matched):
                raise InputError(
                    f"minimum_bits: the pattern {pattern!r} matches none of the "
                    f"{len(matched)} layers, such as {self.index.paths[0]!r}"
                )
            np.maximum(minimums, self.bits.index(bits), out=minimums, where=matched)
        return minimums

    def bits_of(self, solution: Chosen) -> Int[np.ndarray, " C"]:
        """Bits of every channel in a solution of `problem`; `quantizer` rounds to them."""
        choice = np.asarray(solution.choice)
        if choice.shape != (len(self.index),):
            raise InputError(
                f"the solution chooses for {choice.shape} channels, the table has "
                f"{len(self.index)}; solve this table's own problem"
            )
        return np.asarray(self.bits, np.int64)[choice]

    def predicted(self, bits: Int[np.ndarray, " C"]) -> float:
        """Expected joint error of an allocation: the sum of its costs, times the joint factors."""
        bits = self.index.check_bits(bits, self.bits)
        column = np.asarray([self.bits.index(b) for b in bits])
        return float(self.joint_costs[np.arange(len(column)), column].sum())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file with a JSON header, completely or not at all.

        The input statistics have their own file: `table.statistics.save`.
        """
        arrays = {"costs": self.costs.astype(np.float64), "sizes": self.sizes.astype(np.int64)}
        if self.standard_error is not None:
            arrays["standard_error"] = self.standard_error.astype(np.float64)
        header = {
            "method": self.method,
            "bits": list(self.bits),
            "quantizer": dataclasses.asdict(self.settings),
            "joint": None if self.joint is None else list(self.joint),
            "reads": None if self.reads is None else list(self.reads),
            "layers": [dataclasses.asdict(layer) for layer in self.index.layers],
            "provenance": dict(self.provenance),
        }
        write_arrays(path, arrays, header, kind=_KIND)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, statistics: InputStatistics | None = None
    ) -> "SensitivityTable":
        """Reads and validates a table.

        Args:
            path: the file.
            statistics: the statistics that the table was measured with; without them its bits
                cannot be quantized.

        Raises:
            InputError: the file is missing, truncated, of another kind, or inconsistent.
        """
        arrays, header = read_arrays(path, kind=_KIND, required=("costs", "sizes"))
        try:
            return cls(
                costs=arrays["costs"],
                sizes=arrays["sizes"],
                bits=tuple(int(b) for b in header["bits"]),
                index=ChannelIndex(tuple(LayerInfo(**layer) for layer in header["layers"])),
                method=str(header["method"]),
                settings=QuantizerSettings.from_dict(header["quantizer"]),
                joint=None if header["joint"] is None else tuple(map(float, header["joint"])),
                # Files of earlier versions have none.
                reads=None if header.get("reads") is None else tuple(map(int, header["reads"])),
                provenance=dict(header["provenance"]),
                standard_error=arrays.get("standard_error"),
                statistics=statistics,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{os.fspath(path)}: the header of this sensitivity table is damaged ({error!r}); "
                "compute it again"
            ) from error
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}; compute the table again") from error
