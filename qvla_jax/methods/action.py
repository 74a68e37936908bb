"""Our own methods, and the steps between uniform rounding and them: an ablation.

Each recipe names a quantizer, and the options among which the allocation by measured action
sensitivities chooses, for channels or whole layers; without options, all channels have the same
bits. Activations are rounded for each token when the policy runs, in every quantized layer.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from qvla_jax.array_typing import Int
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import quantize, quantize_uniform
from qvla_jax.methods.activations import allocate_activations
from qvla_jax.methods.job import Job
from qvla_jax.methods.packing import described
from qvla_jax.methods.tuning import tune
from qvla_jax.quantization import Quantizer, QuantizerSettings
from qvla_jax.quantization.quantizer import NEAREST_UNCORRECTED
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.sensitivity.joint import alternate
from qvla_jax.solvers import AllocationProblem, solve

_SOLVER = "greedy:marginal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method of ours.

    Attributes:
        title: for tables.
        quantizer: grid, rounding, bias correction.
        options: bits that the allocation chooses among; None gives all channels the same.
        by_layer: all channels of a layer have the same bits.
        rotates: inputs are rotated if activations have fewer than 8 bits, which makes activations
            easier to round and weights harder.
        alternates: alternates between allocating and measuring the allocation's joint factors
            (sensitivity.joint.alternate).
        gripper: weight of the squared error of the grippers' entries of the action, in the
            allocation; every other dimension has weight 1.
        allocates_activations: activation bits of layers are allocated (methods.activations).
        tuned: scales and biases are then tuned on the action error (methods.tuning).
    """

    title: str
    quantizer: QuantizerSettings
    options: tuple[int, ...] | None
    by_layer: bool = False
    rotates: bool = False
    alternates: bool = False
    gripper: float = 1
    allocates_activations: bool = False
    tuned: bool = False

    def __call__(self, job: Job) -> Policy:
        """The packed policy."""
        quantizer = self.quantizer
        if self.rotates and job.setting.activation_bits < 8:
            quantizer = dataclasses.replace(quantizer, rotation=True)
        packed = self._packed(job, quantizer)
        bits = None
        if self.allocates_activations:
            bits = allocate_activations(
                job.policy, packed, job.calibration, job.setting.activation_bits,
                progress=job.progress,
            )  # fmt: skip
        packed = with_activations(job, packed, bits)
        if self.tuned:
            packed = tune(job.policy, packed, job.calibration, progress=job.progress)
        return packed

    def _packed(self, job: Job, quantizer: QuantizerSettings) -> Policy:
        if self.options is None:
            statistics = None
            if quantizer.needs_statistics:
                statistics = job.measured.statistics(quantizer.weighting)
            return quantize_uniform(
                job.policy, int(job.setting.bits), rules=job.rules,
                quantizer=Quantizer(quantizer, statistics),
            )  # fmt: skip
        weights = None
        if self.gripper != 1:
            layout, count = job.policy.layout, job.policy.config.action_dim
            weights = layout.action_weights(dict.fromkeys(layout.grippers, self.gripper), count)
        table = job.measured.table("jacobian", quantizer, self.options, True, weights)
        allocate = functools.partial(self._allocated, budget_bits=job.setting.bits)
        if self.alternates:
            bits = alternate(
                job.policy, job.calibration, table, allocate, rules=job.rules,
                progress=job.progress,
            )  # fmt: skip
        else:
            bits = allocate(table)
        return quantize(job.policy, bits, quantizer=table.quantizer, rules=job.rules)

    def _allocated(self, table: SensitivityTable, budget_bits: float) -> Int[np.ndarray, " C"]:
        problem = table.problem(budget_bits=budget_bits)
        if not self.by_layer:
            return table.bits_of(solve(problem, _SOLVER))
        layer_of = table.index.layer_of
        whole = AllocationProblem(
            costs=_sums(problem.costs, layer_of),
            sizes=_sums(problem.sizes, layer_of),
            budget=problem.budget,
        )
        return np.asarray(table.bits)[solve(whole, _SOLVER).choice][layer_of]


def with_activations(job: Job, packed: Policy, bits: Mapping[str, int] | None = None) -> Policy:
    """The policy with these activation bits in its packed layers, and its header.

    Args:
        job: what the header describes.
        packed: the policy.
        bits: by path of the layer; None gives all layers those of the setting.
    """
    for path, layer in packed_layers(packed.model).items():
        layer.activation_bits = int(job.setting.activation_bits) if bits is None else bits[path]
    header = {**described(job.policy, job.setting, job.made_with)}
    if packed.quantization is not None and "quantizer" in packed.quantization:
        header["quantizer"] = packed.quantization["quantizer"]
    return dataclasses.replace(packed, quantization=header)


def _sums(values: np.ndarray, layer_of: np.ndarray) -> np.ndarray:
    """Sums of rows by layer."""
    sums = np.zeros((layer_of.max() + 1, values.shape[1]), values.dtype)
    np.add.at(sums, layer_of, values)
    return sums


_FEEDBACK = QuantizerSettings()
_AWARE = QuantizerSettings(weighting="action")

RECIPES = {
    "nearest": Recipe(
        title="uniform, fitted grid, round to nearest", quantizer=NEAREST_UNCORRECTED, options=None
    ),
    "feedback": Recipe(
        title="uniform, fitted grid, error feedback",
        quantizer=QuantizerSettings(bias_correction=False), options=None,
    ),
    "aware": Recipe(
        title="uniform, action-aware rounding",
        quantizer=QuantizerSettings(bias_correction=False, weighting="action"), options=None,
    ),
    "action-layers": Recipe(
        title="action sensitivity, bits of layers", quantizer=_FEEDBACK, options=(2, 4, 8, 16),
        by_layer=True,
    ),
    "action-unpruned": Recipe(
        title="action sensitivity, bits of channels", quantizer=_FEEDBACK, options=(2, 4, 8, 16)
    ),
    "action": Recipe(
        title="action sensitivity, with pruning", quantizer=_FEEDBACK, options=(0, 2, 4, 8, 16)
    ),
    "action-uncorrected": Recipe(
        title="the same without bias correction", options=(0, 2, 4, 8, 16),
        quantizer=QuantizerSettings(bias_correction=False),
    ),
    "action-rotated": Recipe(
        title="action sensitivity, with pruning and rotated inputs",
        quantizer=QuantizerSettings(rotation=True), options=(0, 2, 4, 8, 16),
    ),
    "action-three": Recipe(
        title="action sensitivity, with 3 bits", quantizer=_FEEDBACK, options=(0, 2, 3, 4, 8, 16)
    ),
    "action-aware": Recipe(
        title="action sensitivity, with 3 bits and action-aware rounding", quantizer=_AWARE,
        options=(0, 2, 3, 4, 8, 16),
    ),
    "action-alternating": Recipe(
        title="action-aware, allocated anew with its own joint errors", quantizer=_AWARE,
        options=(0, 2, 3, 4, 8, 16), alternates=True,
    ),
    "action-gripper": Recipe(
        title="action-aware, the gripper counts ten times", quantizer=_AWARE,
        options=(0, 2, 3, 4, 8, 16), gripper=10,
    ),
    "action-tuned": Recipe(
        title="action-aware, scales and biases tuned on the action error", quantizer=_AWARE,
        options=(0, 2, 3, 4, 8, 16), rotates=True, tuned=True,
    ),
    "action-activations": Recipe(
        title="the same, activation bits of layers allocated", quantizer=_AWARE,
        options=(0, 2, 3, 4, 8, 16), rotates=True, allocates_activations=True, tuned=True,
    ),
}  # fmt: skip
