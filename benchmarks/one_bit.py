"""Does a width of 1 bit pay? The same bytes with and without it.

    python benchmarks/one_bit.py --model libero-mini --out runs/one-bit

Rows of 1 bit have the codes -1 and 1. No file holds them: this adds the width to the table of code
sets while it runs, measures sensitivities and joint factors as a recipe does, allocates at each
budget with and without the width, and measures the action error of the rounded weights on held-out
frames (`--budgets`; at `--predict` it only prints the error that the allocator predicts). Bytes are
those of `quantization.layout`, which counts 1 bit like the other widths. Then it prints where the
weights and the predicted error of an allocation are (`--parts`, a budget).

The last table (`--values`) compares BitVLA's and HBVLA's rounding, and two values in other forms
with error feedback: the squared error of the outputs over their square, inputs weighted as the
recipe weights them, for 48 rows (all rows of the two rivals) of every fourth layer. Least-squares
scales are mean |w|; stretched ones keep <w, w_hat> = ||w||^2.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qvla_jax.evaluation.offline import PreparedFrames
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.comparable import comparable
from qvla_jax.inference.quantize import policy_index, policy_layers, quantize
from qvla_jax.methods import RECIPES, Measurements, Recipe
from qvla_jax.methods.bitvla import absmean_ternary
from qvla_jax.methods.hbvla import hbvla
from qvla_jax.methods.stages import allocate, measure
from qvla_jax.pipeline import StudyConfig, files
from qvla_jax.pipeline.calibrate import calibrate, load_calibration
from qvla_jax.pipeline.evaluate import heldout_set
from qvla_jax.precision import in_32_bits
from qvla_jax.quantization import QuantizerSettings, codes
from qvla_jax.quantization.feedback import feedback_factor
from qvla_jax.quantization.layers import weight_rows
from qvla_jax.sensitivity import SensitivityTable

# Rows [c, g] of a group -> the two values' mean and half their distance, [c] each.
Values = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def add_one_bit() -> None:
    """Adds the width to the tables that modules hold, before anything is compiled."""
    for maps in codes.CODE_MAPS.values():
        maps[1] = codes.CodeMap(2, -1)  # pyright: ignore[reportIndexIssue]
    tables = {codes.GRID_BITS, codes.BITS}
    for path, module in list(sys.modules.items()):
        for name in ("GRID_BITS", "BITS"):
            if path.startswith("qvla_jax.") and vars(module).get(name) in tables:
                setattr(module, name, tuple(sorted({1, *vars(module)[name]})))


@in_32_bits
def compare(arguments: argparse.Namespace) -> Measurements:
    """Prints the errors at all budgets, and the parts."""
    policy = load_policy(arguments.model)
    config = StudyConfig(model=arguments.model, out=arguments.out)
    horizon = policy.config.action_horizon
    known = (arguments.out / files.CALIBRATION).is_file()
    frames = load_calibration(arguments.out) if known else calibrate(config, horizon=horizon)
    index, recipe = policy_index(policy), RECIPES[arguments.recipe]
    chunk = np.zeros((1, horizon, policy.config.action_dim))
    entries = policy.layout.executed(chunk).size
    heldout = reference = None
    if arguments.budgets:
        heldout = PreparedFrames.of(policy, heldout_set(config, horizon=horizon))
        reference = heldout.predict(comparable(policy)).chunks
    assert recipe.options is not None
    options = tuple(sorted({1, *recipe.options}))
    measured = Measurements(
        policy, frames, options=tuple(sorted({1, *codes.BITS})), folder=arguments.out
    )

    def allocated(own: tuple[int, ...], budget: float) -> tuple[SensitivityTable, np.ndarray]:
        variant = dataclasses.replace(recipe, options=own)
        table = measure(variant, settings_of(variant), measured)
        return table, allocate(variant, table, budget)

    print("| budget | options | predicted | mean | median | gripper | flips | weights by bits |")
    print("|---|---|---|---|---|---|---|---|")
    for budget in sorted({*arguments.budgets, *arguments.predict}):
        for own in (recipe.options, options):
            table, bits = allocated(own, budget)
            measures = ["", "", "", ""]
            if heldout is not None and reference is not None and budget in arguments.budgets:
                rounded = quantize(policy, bits, quantizer=table.quantizer, packed=False)
                errors = heldout.predict(comparable(rounded)).errors(reference)
                measures = [
                    f"{errors.action_mse_normalized:.2g}",
                    f"{errors.action_mse_median_normalized:.2g}",
                    f"{errors.mse_by_dimension[-1]:.2g}",
                    f"{errors.gripper_flip_rate:.1%}",
                ]
            shares = ", ".join(
                f"{b}: {np.sum(index.fan_in[bits == b]) / index.num_weights:.1%}"
                for b in np.unique(bits)
            )
            predicted = np.sum(costs_of(table, bits)) / entries
            name = "with 1" if 1 in own else "without 1"
            cells = (f"{budget:g}", name, f"{predicted:.2g}", *measures, shares)
            print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.parts is not None:
        for own in (recipe.options, options):
            print_parts(policy, *allocated(own, arguments.parts), entries)
    return measured


def costs_of(table: SensitivityTable, bits: np.ndarray) -> np.ndarray:
    """What the allocator adds up: the cost of every channel at its bits, joint factors included."""
    columns = np.searchsorted(table.bits, bits)
    return (table.costs * np.asarray(table.joint or 1.0))[np.arange(len(bits)), columns]


def print_parts(policy: Policy, table: SensitivityTable, bits: np.ndarray, entries: int) -> None:
    """Prints the parts of a policy: layers of one kind of block, at any depth."""
    index, costs = table.index, costs_of(table, bits) / entries
    types = [policy.layout.module_type(path).rpartition(".")[0] for path in index.paths]
    part_of = np.asarray(types)[index.layer_of]
    print("\n| part | million weights | average bits | pruned | at 1 bit | pruning | rounding |")
    print("|---|---|---|---|---|---|---|")
    for part in dict.fromkeys(types):
        own, fan_in = part_of == part, index.fan_in
        weights = fan_in[own].sum()
        pruned, binary = (fan_in[own & (bits == b)].sum() / weights for b in (0, 1))
        print(
            f"| {part} | {weights / 1e6:.2f} | {np.sum((bits * fan_in)[own]) / weights:.2f} "
            f"| {pruned:.0%} | {binary:.0%} | {costs[own & (bits == 0)].sum():.1e} "
            f"| {costs[own & (bits > 0)].sum():.1e} |"
        )


def settings_of(recipe: Recipe) -> QuantizerSettings:
    """A recipe's quantizer, which must be ours."""
    assert isinstance(recipe.quantizer, QuantizerSettings)
    return recipe.quantizer


def symmetric(stretch: float) -> Values:
    """-s and s; stretch 0: least squares, 1: unbiased."""

    def values(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least = np.abs(rows).mean(axis=1)
        unbiased = np.sum(rows**2, axis=1) / np.maximum(np.abs(rows).sum(axis=1), 1e-30)
        return np.zeros_like(least), unbiased**stretch * least ** (1 - stretch)

    return values


def with_offset(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row's mean less and plus s, stretched."""
    mean = rows.mean(axis=1)
    return mean, symmetric(1)(rows - mean[:, None])[1]


def fed_back(
    weight: np.ndarray, moment: np.ndarray, values: Values, group: int | None
) -> np.ndarray:
    """Rows on two values by error feedback, one input after the other, in float64."""
    order, factor = feedback_factor(moment, 0.01)
    group = group or weight.shape[1]
    scales = [values(weight[:, i : i + group]) for i in range(0, weight.shape[1], group)]
    work, rounded = weight.copy(), np.empty_like(weight)
    for step, i in enumerate(order):
        mean, half = scales[i // group]
        rounded[:, i] = mean + np.where(work[:, i] >= mean, half, -half)
        error = (work[:, i] - rounded[:, i]) / factor[step, step]
        work[:, order[step + 1 :]] -= error[:, None] * factor[step, step + 1 :]
    return rounded


def relative_error(rounded: np.ndarray, weight: np.ndarray, moment: np.ndarray) -> float:
    """Squared error of a row's output over its square, averaged over rows."""
    change = rounded - weight
    squares = np.sum((weight @ moment) * weight, axis=1)
    return float(np.mean(np.sum((change @ moment) * change, axis=1) / squares))


def compare_values(measured: Measurements, recipe: str) -> None:
    """Prints the last table."""
    statistics = measured.statistics(settings_of(RECIPES[recipe]).weighting)
    draw, rows, rivals = np.random.default_rng(0), {}, []
    for path, layer in list(policy_layers(measured.policy).items())[1::4]:
        weight, mean = np.asarray(weight_rows(layer), np.float64), statistics.means[path]
        rows[path] = weight[draw.permutation(len(weight))[:48]]
        # They correct no bias, so their error on the mean input counts.
        moment = statistics.covariance(path) + np.outer(mean, mean)
        ternary = absmean_ternary(layer.kernel[...].T)
        rounded = np.asarray(ternary.codes, np.float64) * ternary.scales
        rivals.append(
            [relative_error(w, weight, moment) for w in (rounded, hbvla(weight, moment).values)]
        )
    print("\n| rounding | output error |\n|---|---|")
    for name, error in zip(("BitVLA", "HBVLA"), np.mean(rivals, axis=0), strict=True):
        print(f"| {name}, all rows | {error:.3f} |")
    forms: tuple[tuple[str, Values, int | None], ...] = (
        ("-s, s: least squares", symmetric(0), None),
        ("-s, s: half stretched", symmetric(0.5), None),
        ("-s, s: stretched", symmetric(1), None),
        ("-s, s: stretched further", symmetric(1.25), None),
        ("m - s, m + s: stretched", with_offset, None),
        ("-s, s: stretched, groups of 64", symmetric(1), 64),
    )
    for name, values, group in forms:
        errors = []
        for path, weight in rows.items():
            moment = statistics.covariance(path)
            rounded = fed_back(weight, moment, values, group)
            errors.append(relative_error(rounded, weight, moment))
        print(f"| {name} | {np.mean(errors):.3f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="libero-mini")
    parser.add_argument("--recipe", default="action-aware", help="one of ours that allocates")
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 1.25, 1.5, 2.0, 2.5])
    parser.add_argument("--predict", type=float, nargs="*", default=[], help="more budgets")
    parser.add_argument("--parts", type=float, help="a budget")
    parser.add_argument("--values", action="store_true", help="other forms of two values")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps measurements")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    add_one_bit()
    measured = compare(arguments)
    if arguments.values:
        compare_values(measured, arguments.recipe)


if __name__ == "__main__":
    main()
