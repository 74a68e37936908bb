"""A method as data: what each stage does, from the sensitivities to the tuned policy."""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

from qvla_jax.inference.policy import Policy
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization import QuantizerSettings
from qvla_jax.quantization.codes import GRID_BITS

# A published quantizer with steps of its own: the packed policy at a setting's bits.
Rounding: TypeAlias = Callable[[Measurements, Setting], Policy]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method. Without `options` there is nothing to measure or to allocate."""

    # For tables.
    title: str

    # Quantize: grid, rounding and bias correction; or the step of a published quantizer.
    quantizer: QuantizerSettings | Rounding = dataclasses.field(default_factory=QuantizerSettings)
    # Bits of weights that it has, if it does not allocate them.
    widths: tuple[int, ...] = GRID_BITS
    # Groups of inputs may have scales of their own.
    grouped: bool = False
    # Rotate inputs if activations have fewer than 8 bits, which makes activations easier to round
    # and weights harder.
    rotates: bool = False

    # Measure: the bits that the allocation chooses among (None gives all channels those of the
    # setting), the estimator of their costs, and whether joint factors are measured as well.
    options: tuple[int, ...] | None = None
    estimator: str = "jacobian"
    joint: bool = True
    # Weight of the squared error of the grippers' entries of the action; each other one has 1.
    gripper: float = 1

    # Allocate: the solver, whether it chooses for channels or whole layers, and what the budget
    # counts: all stored bytes of the weights, or bits of codes as an average over channels.
    solver: str = "greedy:marginal"
    unit: Literal["channel", "layer"] = "channel"
    budget: Literal["bytes", "codes"] = "bytes"
    # Alternate between allocating and measuring the allocation's joint factors.
    alternates: bool = False

    # Activations: at the setting's bits; at these, below 16 only; or allocated to layers under the
    # setting's bits as a budget (methods.activations).
    activations: Literal["any", "rounded", "allocated"] = "any"
    # Finally tune scales and biases on the action error (methods.tuning).
    tuned: bool = False

    @property
    def allocates(self) -> bool:
        """Whether the setting's bits of weights are a budget, which may be fractional."""
        return self.options is not None
