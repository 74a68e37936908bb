"""Stage 2: measure what each output channel costs at each bit-width, and validate it."""

import dataclasses
import time
from pathlib import Path

from qvla_jax import sharding
from qvla_jax.atomic import write_json
from qvla_jax.data.calibration import CalibrationSet
from qvla_jax.errors import BudgetError, InputError, unknown
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.methods.measurements import Measurements, SweepSettings
from qvla_jax.methods.recipes import RUN_OPTIONS, RUN_RECIPE
from qvla_jax.methods.stages import measure
from qvla_jax.pipeline import files
from qvla_jax.pipeline.calibrate import check_frames, load_calibration
from qvla_jax.pipeline.configs import SensitivityConfig
from qvla_jax.plain import to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress, prefixed
from qvla_jax.quantization import QuantizerSettings, option_sizes
from qvla_jax.sensitivity import ESTIMATORS, SensitivityTable, validate
from qvla_jax.sensitivity.validation import Ranking, SavedRanking

TIMES_KIND = "qvla_jax.sensitivity_times"


@in_32_bits
def sensitivity(
    config: SensitivityConfig,
    *,
    policy: Policy | None = None,
    calibration: CalibrationSet | None = None,
    progress: Progress = no_progress,
) -> Ranking | None:
    """Measures the sensitivities and those of the baselines, and ranks some channels exactly.

    Measurements are kept in the folder, and finished items of a sweep that was killed are, too:
    called again with the same settings, it takes them from there. All processes call it with the
    same arguments; the main one writes.

    Args:
        config: settings.
        policy: the policy, if it is loaded already.
        calibration: the calibration set, if it is loaded already.
        progress: reports progress.

    Returns:
        How the table ranks the channels; None if it was skipped.

    Raises:
        InputError: there is no calibration manifest, or an estimator's name is unknown.
    """
    files.check_folder(config.out)
    check_estimators(config)
    calibration = load_calibration(config.out) if calibration is None else calibration
    if policy is None:
        policy = load_policy(
            config.model, mapped=config.streamed, progress=progress, **config.said()
        )
        check_frames(policy, calibration)
    measured = Measurements(
        policy,
        calibration,
        options=RUN_OPTIONS,
        sweep=SweepSettings(
            probes=config.probes,
            exact_share=config.exact_share,
            seed=config.seed,
            mesh=sharding.sweep_mesh(config.channel_devices),
            split_weights=config.split_weights,
            streamed=config.streamed,
        ),
        folder=config.out,
    )
    # Error feedback needs covariances, [k, k] for every layer.
    quantizer = QuantizerSettings(rounding="nearest" if config.streamed else "feedback")
    tables: dict[str, SensitivityTable] = {}
    seconds = load_seconds(config.out)
    for estimator in dict.fromkeys((config.estimator, *config.baselines)):
        measured.progress = prefixed(progress, estimator)
        recipe = dataclasses.replace(RUN_RECIPE, estimator=estimator, joint=not config.streamed)
        started, taken = time.perf_counter(), len(measured.taken)
        tables[estimator] = measure(recipe, quantizer, measured)
        if len(measured.taken) > taken or estimator not in seconds:
            seconds[estimator] = time.perf_counter() - started
    ranks = None
    if config.validate and config.estimator != "exact":
        ranks = validate(
            policy,
            calibration,
            tables[config.estimator],
            channels=config.validate,
            frames=config.validate_frames,
            seed=config.seed,
            progress=prefixed(progress, "validation"),
        )
    if sharding.is_main_process():
        _write(config, tables, seconds, ranks)
    return ranks


def check_estimators(config: SensitivityConfig) -> None:
    """Checks the estimators' names.

    Raises:
        InputError: one is unknown; the message suggests close ones.
    """
    if config.streamed and (config.validate or config.baselines):
        raise InputError(
            "a streamed sweep takes neither --validate, --baselines nor --thorough: these need all "
            "weights in memory"
        )
    for estimator in (config.estimator, *config.baselines):
        if estimator not in ESTIMATORS:
            raise InputError(unknown("estimator", estimator, ESTIMATORS))


def check_budget(policy: Policy, budget_bits: float) -> None:
    """Checks, before anything is measured, that a budget can be met.

    Raises:
        BudgetError: the smallest option of every channel takes more; the message says how much.
        InputError: a weight is not finite.
    """
    index = policy_index(policy)
    least = int(option_sizes(index, RUN_OPTIONS).min(axis=1).sum())
    if least > int(budget_bits * index.num_weights / 8):
        bits = -(-800 * least // index.num_weights) / 100
        raise BudgetError(
            f"a budget of {budget_bits:g} bits per weight cannot be met: biases and index of the "
            f"{len(index):,} channels alone take {least:,} bytes; give at least {bits:g} bits"
        )


def load_ranks(folder: Path) -> SavedRanking | None:
    """Reads ranks.json; None if no channel was probed exactly."""
    path = folder / files.RANKS
    return files.read_result(path, SavedRanking) if path.exists() else None


def load_seconds(folder: Path) -> dict[str, float]:
    """Reads how long each estimator took, where that was recorded."""
    path = folder / files.TIMES
    return files.read_json(path, kind=TIMES_KIND)["seconds"] if path.exists() else {}


def _write(
    config: SensitivityConfig,
    tables: dict[str, SensitivityTable],
    seconds: dict[str, float],
    ranks: Ranking | None,
) -> None:
    """Replaces all files of this stage, so that none of an earlier run remains."""
    for old in (*config.out.glob("sensitivity*.safetensors"), config.out / files.RANKS):
        old.unlink(missing_ok=True)
    main = tables[config.estimator]
    if main.statistics is not None:
        main.statistics.save(config.out / files.STATISTICS)
    for estimator, table in tables.items():
        table.save(files.sensitivity_file(config.out, estimator, main=config.estimator))
    header = {"format": TIMES_KIND, "version": 1}
    taken = {estimator: seconds[estimator] for estimator in tables}
    write_json(config.out / files.TIMES, {**header, "seconds": taken})
    if ranks is not None:
        saved = SavedRanking(made_from=files.made_from(main), **vars(ranks))
        write_json(config.out / files.RANKS, to_plain(saved))
