"""`Allocation`: bits for every channel, how they are rounded, and how they were found."""

import dataclasses
from typing import Any, Final

from qvla_jax.array_typing import Integer, NpArray
from qvla_jax.errors import InputError
from qvla_jax.quantization.codes import BITS
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.quantizer import Quantizer

_NOT_JSON: Final = ("bits", "index", "quantizer")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """Bits for every channel, how they are rounded, and how they were found.

    Attributes:
        bits: `[C]`, in the order of `index`.
        index: the quantized layers and the order of their channels.
        quantizer: grid, rounding and bias correction that the costs refer to; None if the table was
            loaded without the input statistics that it needs.
        sensitivity: the method that the costs come from.
        solver: the solver's registered name.
        budget_bits: the budget in bits per quantized weight, counting everything stored.
        budget_bytes: the same in bytes.
        stored_bytes: what the allocation stores, at most `budget_bytes`.
        predicted_sse_normalized: the summed costs, which would be the joint error if errors simply
            added up.
        lower_bound: no allocation within the budget has a smaller sum of costs.
        seconds: the solver's run time.
        baseline: the costs are not those of the run's own method.
        matches: the bits of the uniform grid whose bytes are the budget, if it was chosen so.
        budget_read: a second budget, if there is one: bits per weight that a call of the policy
            reads, each counted as often as it is read.
        read_bytes: bytes that a call of the policy reads of the quantized layers; None if unknown.

    Raises:
        InputError: `bits` has the wrong length or holds a width that is not an option.
    """

    bits: Integer[NpArray, " C"]
    index: ChannelIndex
    quantizer: Quantizer | None
    sensitivity: str
    solver: str
    budget_bits: float
    budget_bytes: int
    stored_bytes: int
    predicted_sse_normalized: float
    lower_bound: float
    seconds: float
    baseline: bool = False
    matches: int | None = None
    budget_read: float | None = None
    read_bytes: int | None = None

    def __post_init__(self) -> None:
        self.index.check_bits(self.bits, BITS)

    @property
    def gap(self) -> float:
        """Relative excess of the summed costs over the lower bound; 0 is proven optimal."""
        # Imported late: a policy runs without the solvers.
        from qvla_jax.solvers.solution import relative_gap

        return relative_gap(self.predicted_sse_normalized, self.lower_bound)

    @property
    def budget(self) -> str:
        """Names the budget.

        `3.5` (bits), `3.5,read3` with a budget of bytes read, or `uniform4` for the bytes of that
        uniform grid.
        """
        if self.matches is not None:
            return f"uniform{self.matches}"
        read = "" if self.budget_read is None else f",read{self.budget_read:g}"
        return f"{self.budget_bits:g}{read}"

    @property
    def name(self) -> str:
        """Identifies the allocation within a run."""
        return f"{self.sensitivity}+{self.solver}@{self.budget}"

    def describe(self) -> dict[str, Any]:
        """How it was found, as JSON types."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in _NOT_JSON}

    def check(self, index: ChannelIndex) -> None:
        """Raises an `InputError` unless a policy's layers are those of the allocation."""
        pairs = [(layer.path, layer.out_features, layer.fan_in) for layer in self.index.layers]
        found = [(layer.path, layer.out_features, layer.fan_in) for layer in index.layers]
        if pairs == found:
            return
        number = next(
            (n for n, (a, b) in enumerate(zip(pairs, found, strict=False)) if a != b), None
        )
        if number is None:
            raise InputError(
                f"the allocation is for {len(pairs)} layers, the policy has {len(found)} quantized "
                "layers; give both the same `rules`, or allocate again for this policy"
            )
        raise InputError(
            f"the allocation is for another policy: its quantized layer {number} is "
            f"{_layer(*pairs[number])}, the policy's is {_layer(*found[number])}; allocate again "
            "for this policy"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """An allocation between few bytes stored and few bytes read.

    Attributes:
        budget_bits: bits per weight at which bytes stored alone reach the same cost.
        cost: summed, at most a step from that of this budget.
        stored_bytes: bytes stored.
        read_bytes: bytes that a call of the policy reads.
    """

    budget_bits: float
    cost: float
    stored_bytes: int
    read_bytes: int


def _layer(path: str, out_features: int, fan_in: int) -> str:
    return f"{path} [{out_features}, {fan_in}]"
