"""Can the sensitivities of a run be trusted? Ranks, additivity, stability, sensitive modules.

It stands outside of the pipeline: it reads the files of `calibrate` and `sensitivity`, and no stage
reads its result.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np
from flax import nnx

from qvla_jax.array_typing import Float
from qvla_jax.atomic import write_json
from qvla_jax.data.calibration import CalibrationSet
from qvla_jax.evaluation.validation import (
    Additivity,
    Cumulative,
    EmbeddingCosts,
    ModuleCosts,
    Ranks,
    Stability,
    TokenCosts,
    Validation,
)
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import quantize, quantize_uniform
from qvla_jax.models.surgery import named_modules
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import load_tables
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.configs import ValidateConfig
from qvla_jax.pipeline.evaluate import check_disjoint, heldout_set
from qvla_jax.plain import to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress, prefixed
from qvla_jax.provenance import provenance
from qvla_jax.quantization.codes import GRID_BITS, SOURCE
from qvla_jax.quantization.layers import LayerRules
from qvla_jax.report.validation import draw
from qvla_jax.sensitivity import SensitivityTable, joint_error, sensitivities, spearman
from qvla_jax.sensitivity.embeddings import RowCosts, embedding_costs
from qvla_jax.sensitivity.probes import DEFAULT_PROBES, Probes
from qvla_jax.sensitivity.ranks import top_overlap
from qvla_jax.sensitivity.strata import module_types
from qvla_jax.sensitivity.trajectories import trajectory_costs
from qvla_jax.sensitivity.validation import probe_sample, same_frames
from qvla_jax.solvers import solve


@in_32_bits
def validate(config: ValidateConfig, *, progress: Progress = no_progress) -> Validation:
    """Studies the sensitivity table in `config.out`, and writes validation.json.

    Raises:
        InputError: the calibration set or the table is missing, or belongs to another policy.
    """
    policy = load_policy(config.model, progress=progress, **config.said())
    calibration = load_calibration(config.out)
    table = load_tables(config.out)[0]
    files.check_same(
        config.out / files.SENSITIVITY,
        files.made_from(table),
        {"policy fingerprint": policy.fingerprint, "calibration hash": calibration.hash},
        remedy=f"run `qvla sensitivity --out {config.out}` again",
    )
    files.check_steps(config.out, table, policy.layout.executed_steps)
    heldout = heldout_set(config, horizon=policy.config.action_horizon)
    check_disjoint(calibration, heldout)
    embeddings = embedding_costs(
        policy,
        calibration,
        bits=table.bits,
        probes=_probes(table),
        seed=config.seed,
        progress=progress,
    )
    validation = Validation(
        made_from=files.made_from(table),
        model_options=config.said(),
        method=table.method,
        bits=table.bits,
        ranks=_ranks(config, policy, calibration, table, progress),
        additivity=tuple(_additivity(config, policy, calibration, heldout, table, progress)),
        stability=tuple(_stability(config, policy, calibration, table, progress)),
        noise=tuple(_noise(config, policy, calibration, table, progress)),
        cumulative=_cumulative(config, policy, calibration, table, progress)
        if config.trajectories
        else None,
        modules=(
            *_modules(config, policy, calibration, table, progress),
            *map(_embedding_module, embeddings),
        ),
        embeddings=tuple(_embedding(policy, calibration, costs) for costs in embeddings),
        provenance=provenance(seed=config.seed),
    )
    write_json(config.out / files.VALIDATION, to_plain(validation))
    draw(validation, config.out / files.VALIDATION_FIGURE)
    return validation


def _ranks(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> Ranks:
    """Each estimator against exact probing of the same channels on the same frames."""
    sample = probe_sample(
        policy, calibration, table, channels=config.channels, frames=config.frames,
        seed=config.seed, progress=progress,
    )  # fmt: skip
    by_estimator = {}
    for estimator in dict.fromkeys((table.method, *config.estimators)):
        same = same_frames(
            policy, sample, table, method=estimator, seed=config.seed,
            progress=prefixed(progress, estimator),
        )  # fmt: skip
        by_estimator[estimator] = sample.ranks(same)
    return Ranks(channels=len(sample.rows), frames=sample.part.frames, methods=by_estimator)


def _additivity(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    heldout: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> list[Additivity]:
    """The sum of the chosen costs, with and without joint factors, and the measured error."""
    single = dataclasses.replace(table, joint=None)
    rows = []
    for done, budget in enumerate(config.budgets):
        progress("additivity", done, len(config.budgets))
        bits = table.bits_of(solve(table.problem(budget_bits=budget), "greedy:marginal"))
        quantized = quantize(policy, bits, quantizer=table.quantizer, packed=False)
        rows.append(
            Additivity(
                budget_bits=budget,
                pruned=float(np.mean(bits == 0)),
                summed=single.predicted(bits),
                predicted=table.predicted(bits),
                measured_calibration=joint_error(policy, quantized, calibration),
                measured_heldout=joint_error(policy, quantized, heldout),
            )
        )
    progress("additivity", len(config.budgets), len(config.budgets))
    return rows


def _stability(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> list[Stability]:
    """Tables of other calibration sets: their rank correlation and what their choice costs here."""
    horizon = policy.config.action_horizon
    drawn = (
        calibration.redraw(frames=frames, seed=seed, horizon=horizon)
        for frames in config.sizes
        for seed in config.seeds
    )
    seeds = config.seeds * len(config.sizes)
    return _compared(config, policy, table, zip(seeds, drawn, strict=True), progress)


def _noise(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> list[Stability]:
    """The same for the table's own frames with other noise, if the policy samples."""
    if not policy.observation.sampled:
        return []
    drawn = ((draw, calibration.with_noise(draw)) for draw in config.noises)
    return _compared(config, policy, table, drawn, progress)


def _compared(
    config: ValidateConfig,
    policy: Policy,
    table: SensitivityTable,
    drawn: Iterable[tuple[int, CalibrationSet]],
    progress: Progress,
) -> list[Stability]:
    """The tables of other sets against this one; each set comes with its seed."""
    problems = {b: table.problem(budget_bits=b) for b in config.budgets}
    best = {b: solve(problem, "greedy:marginal").cost for b, problem in problems.items()}
    reached = table.costs.any(axis=1)
    rows = []
    for seed, frames in drawn:
        other = sensitivities(
            policy, frames, method=table.method, bits=table.bits,
            probes=_probes(table), seed=seed,
            quantizer=table.settings, statistics=table.statistics, joint=False,
            progress=prefixed(progress, f"{frames.frames} frames, seed {seed}"),
        )  # fmt: skip
        other = dataclasses.replace(other, joint=table.joint)
        regret = {}
        for budget, problem in problems.items():
            choice = solve(other.problem(budget_bits=budget), "greedy:marginal").choice
            cost = float(problem.costs[np.arange(len(choice)), choice].sum())
            regret[f"{budget:g}"] = cost / best[budget] - 1
        rows.append(
            Stability(
                frames=frames.frames,
                seed=seed,
                spearman={
                    str(b): spearman(table.costs[reached, i], other.costs[reached, i])
                    for i, b in enumerate(table.bits)
                    if b != SOURCE
                },
                regret=regret,
            )
        )
    return rows


def _cumulative(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> Cumulative:
    """The table, whose frames are drawn independently, against sums along whole trajectories."""
    horizon = policy.config.action_horizon
    drawn = calibration.redraw(
        trajectories=config.trajectories, stride=horizon, seed=config.seed, horizon=horizon
    )
    sums = trajectory_costs(
        policy, drawn, table, probes=_probes(table), seed=config.seed,
        progress=prefixed(progress, "trajectories"),
    )  # fmt: skip
    reached = table.costs.any(axis=1)
    mean = sums.mean(axis=0)
    ranks: dict[str, float] = {}
    top: dict[str, float] = {}
    single: dict[str, tuple[float, float, float]] = {}
    for column, b in enumerate(table.bits):
        if b == SOURCE:
            continue
        single_step = table.costs[reached, column]
        each = [spearman(one[reached, column], single_step) for one in sums]
        ranks[str(b)] = spearman(mean[reached, column], single_step)
        top[str(b)] = top_overlap(single_step, mean[reached, column])
        least, median, largest = np.quantile(each, (0, 0.5, 1)).tolist()
        single[str(b)] = least, median, largest
    return Cumulative(
        trajectories=len(sums),
        frames=drawn.frames,
        stride=horizon,
        spearman=ranks,
        top=top,
        single=single,
    )


def _modules(
    config: ValidateConfig,
    policy: Policy,
    calibration: CalibrationSet,
    table: SensitivityTable,
    progress: Progress,
) -> list[ModuleCosts]:
    """Mean cost of a channel and of a weight for each module type, kept layers included."""
    rows = _module_rows(table, policy, kept=False)
    quantized = frozenset(table.index.paths)
    kept = [path for path in named_modules(policy.model, nnx.Linear) if path not in quantized]
    if kept:
        of_kept = sensitivities(
            policy, calibration, method=table.method, bits=table.bits, probes=_probes(table),
            seed=config.seed, quantizer=table.settings, joint=False,
            rules=LayerRules(include=tuple(f"{re.escape(path)}$" for path in kept)),
            progress=prefixed(progress, "kept layers"),
        )  # fmt: skip
        rows += _module_rows(of_kept, policy, kept=True)
    return sorted(rows, key=lambda row: row.module)


def _module_rows(table: SensitivityTable, policy: Policy, *, kept: bool) -> list[ModuleCosts]:
    """One row for each module type of a table, without those that no action reads."""
    names, numbers = module_types(table.index, policy.layout)
    fan_in = np.asarray([layer.fan_in for layer in table.index.layers])[table.index.layer_of]
    return [
        _module_costs(
            name,
            table.costs[numbers == number],
            table.bits,
            weights=int(fan_in[numbers == number].sum()),
            kept=kept,
        )
        for number, name in enumerate(names)
        if table.costs[numbers == number].any()
    ]


def _probes(table: SensitivityTable) -> Probes:
    """The probes that a table was measured with."""
    return table.provenance["settings"]["probes"] or DEFAULT_PROBES


def _module_costs(
    name: str,
    costs: Float[np.ndarray, "c n"],
    bits: tuple[int, ...],
    *,
    weights: int,
    kept: bool,
) -> ModuleCosts:
    """Means over the channels of a module type."""

    def by_bits(values: Float[np.ndarray, " n"]) -> dict[str, float]:
        return dict(zip(map(str, bits), values.tolist(), strict=True))

    return ModuleCosts(
        module=name,
        kept=kept,
        channels=len(costs),
        weights=weights,
        cost_of_channel=by_bits(costs.mean(axis=0)),
        cost_of_thousand_weights=by_bits(1000 * costs.sum(axis=0) / weights),
    )


def _embedding_module(found: RowCosts) -> ModuleCosts:
    """The measured rows of a token embedding as a module, which keeps its bits by default."""
    weights = len(found.tokens) * found.shape[1]
    return _module_costs(found.path, found.costs, found.bits, weights=weights, kept=True)


def _embedding(policy: Policy, calibration: CalibrationSet, found: RowCosts) -> EmbeddingCosts:
    """Costs of single rows, and the error of rounding all tables at once."""
    bits = [b for b in found.bits if b in GRID_BITS]
    columns = {str(b): found.bits.index(b) for b in bits}
    order = np.argsort(-found.costs.sum(axis=1), kind="stable")
    measured = {
        str(b): joint_error(
            policy,
            quantize_uniform(policy, SOURCE, packed=False, embedding_bits=b),
            calibration,
        )
        for b in bits
    }
    return EmbeddingCosts(
        module=found.path,
        rows=found.shape[0],
        unmeasured_rows=found.shape[0] - len(found.tokens),
        tokens=tuple(
            TokenCosts(
                token=int(found.tokens[i]),
                frames=int(found.frames[i]),
                costs={name: float(found.costs[i, column]) for name, column in columns.items()},
            )
            for i in order
        ),
        summed={name: float(found.costs[:, column].sum()) for name, column in columns.items()},
        measured=measured,
    )
