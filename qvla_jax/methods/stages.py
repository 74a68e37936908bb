"""Carries out a recipe: measure, allocate, quantize. `qvla run` takes the same steps."""

import dataclasses
import functools

import numpy as np

from qvla_jax import allocation
from qvla_jax.array_typing import Int
from qvla_jax.errors import InputError
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import quantize, quantize_uniform
from qvla_jax.methods.activations import allocate_activations
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.packing import described
from qvla_jax.methods.recipe import Recipe
from qvla_jax.methods.recipes import RECIPES, check_setting
from qvla_jax.methods.settings import Setting
from qvla_jax.methods.tuning import tune
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import LayerRules, Quantizer, QuantizerSettings
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.joint import alternate
from qvla_jax.solvers import AllocationProblem, solve


def quantize_by(
    policy: Policy,
    calibration: Calibration,
    name: str,
    *,
    measured: Measurements | None = None,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> Policy:
    """The policy quantized by a method, running from packed weights.

    Args:
        policy: the full-precision policy; it is not changed.
        calibration: the only frames that a method may see.
        name: METHOD-wBITS[aBITS][-gGROUP], such as "gptq-w4"; see `RECIPES`.
        measured: shared measurements on the same policy and frames; their rules and progress then
            apply.
        rules: which layers are quantized; None takes those of the policy's layout.
        progress: reports progress.

    Raises:
        InputError: the name is wrong, the set is empty, or a weight or input is not finite.
        BudgetError: the budget of a method that allocates is below what can be stored.
    """
    setting = check_setting(name)
    recipe = RECIPES[setting.method]
    if policy.quantization is not None:
        raise InputError("the policy is quantized already; quantize the full-precision one")
    if measured is None:
        measured = Measurements(policy, calibration, rules=rules, progress=progress)
    if not isinstance(recipe.quantizer, QuantizerSettings):
        return recipe.quantizer(measured, setting)
    quantizer = recipe.quantizer
    if recipe.rotates and setting.activation_bits < 8:
        quantizer = dataclasses.replace(quantizer, rotation=True)
    packed = _packed(recipe, quantizer, measured, setting)
    packed = _with_activations(recipe, packed, measured, setting)
    if recipe.tuned:
        packed = tune(policy, packed, measured.calibration, progress=measured.progress)
    return packed


def measure(
    recipe: Recipe, quantizer: QuantizerSettings, measured: Measurements
) -> SensitivityTable:
    """The costs of a recipe's options under a quantizer."""
    assert recipe.options is not None
    weights = None
    if recipe.gripper != 1:
        layout, count = measured.policy.layout, measured.policy.config.action_dim
        weights = layout.action_weights(dict.fromkeys(layout.grippers, recipe.gripper), count)
    return measured.table(recipe.estimator, quantizer, recipe.options, recipe.joint, weights)


def allocate(recipe: Recipe, table: SensitivityTable, budget_bits: float) -> Int[np.ndarray, " C"]:
    """Bits of every channel within a budget.

    Raises:
        BudgetError: even the smallest option of every channel exceeds it.
    """
    if recipe.budget == "bytes" and recipe.unit == "channel":
        found = allocation.allocate(table, budget_bits=budget_bits, solver=recipe.solver)
        return found.bits
    if recipe.budget == "codes":
        sizes = np.broadcast_to(np.asarray(table.bits, np.int64), table.costs.shape).copy()
        problem = AllocationProblem(
            costs=table.costs, sizes=sizes, budget=int(budget_bits * len(table.index))
        )
    else:
        problem = table.problem(budget_bits=budget_bits)
    if recipe.unit == "channel":
        return table.bits_of(solve(problem, recipe.solver))
    layer_of = table.index.layer_of
    whole = AllocationProblem(
        costs=_sums(problem.costs, layer_of),
        sizes=_sums(problem.sizes, layer_of),
        budget=problem.budget,
    )
    return np.asarray(table.bits)[solve(whole, recipe.solver).choice][layer_of]


def _packed(
    recipe: Recipe, quantizer: QuantizerSettings, measured: Measurements, setting: Setting
) -> Policy:
    """The policy at the setting's bits, or at bits that are allocated within them."""
    policy, rules = measured.policy, measured.rules
    if recipe.options is None:
        statistics = None
        if quantizer.needs_statistics:
            statistics = measured.statistics(quantizer.weighting)
        bound = Quantizer(quantizer, statistics)
        return quantize_uniform(policy, int(setting.bits), rules=rules, quantizer=bound)
    table = measure(recipe, quantizer, measured)
    allocated = functools.partial(allocate, recipe, budget_bits=setting.bits)
    if recipe.alternates:
        bits = alternate(
            policy, measured.calibration, table, allocated, rules=rules,
            progress=measured.progress,
        )  # fmt: skip
    else:
        bits = allocated(table)
    return quantize(policy, bits, quantizer=table.quantizer, rules=rules)


def _with_activations(
    recipe: Recipe, packed: Policy, measured: Measurements, setting: Setting
) -> Policy:
    """The policy with activation bits in its packed layers, and its header."""
    bits = dict.fromkeys(packed_layers(packed.model), int(setting.activation_bits))
    if recipe.activations == "allocated":
        bits = allocate_activations(
            measured.policy, packed, measured.calibration, setting.activation_bits,
            progress=measured.progress,
        )  # fmt: skip
    for path, layer in packed_layers(packed.model).items():
        layer.activation_bits = bits[path]
    header = described(measured, setting)
    if packed.quantization is not None and "quantizer" in packed.quantization:
        header["quantizer"] = packed.quantization["quantizer"]
    return dataclasses.replace(packed, quantization=header)


def _sums(values: np.ndarray, layer_of: np.ndarray) -> np.ndarray:
    """Sums of rows by layer."""
    sums = np.zeros((layer_of.max() + 1, values.shape[1]), values.dtype)
    np.add.at(sums, layer_of, values)
    return sums
