"""Stage 2: measure what each output channel costs at each bit-width, and validate it."""

import shutil
import time
from pathlib import Path

from qvla_jax import sharding
from qvla_jax.atomic import write_json
from qvla_jax.data.calibration import CalibrationSet
from qvla_jax.errors import BudgetError, InputError, unknown
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.pipeline import files
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.configs import SensitivityConfig
from qvla_jax.plain import to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress, prefixed
from qvla_jax.quantization import QuantizerSettings, option_sizes
from qvla_jax.sensitivity import (
    METHODS,
    SensitivityTable,
    SweepStore,
    sensitivities,
    validate,
)
from qvla_jax.sensitivity.validation import SavedValidation, Validation

BITS = (0, 2, 4, 8, 16)
TIMES_KIND = "qvla_jax.sensitivity_times"


@in_32_bits
def sensitivity(
    config: SensitivityConfig,
    *,
    policy: Policy | None = None,
    calibration: CalibrationSet | None = None,
    progress: Progress = no_progress,
) -> Validation | None:
    """Measures the sensitivities and those of the baselines, and validates the former.

    Finished items are kept in `out`/sweep until the tables are written: called again with the same
    settings after a kill, it resumes from them. All processes call it with the same arguments; the
    main one writes.

    Args:
        config: settings.
        policy: the policy, if it is loaded already.
        calibration: the calibration set, if it is loaded already.
        progress: reports progress.

    Returns:
        The validation; None if it was skipped.

    Raises:
        InputError: there is no calibration manifest, or a method's name is unknown.
    """
    files.check_folder(config.out)
    check_methods(config)
    calibration = load_calibration(config.out) if calibration is None else calibration
    if policy is None:
        policy = load_policy(config.model, mapped=config.streamed, **config.said())
    mesh = sharding.sweep_mesh(config.channel_devices)
    store = SweepStore(config.out / files.SWEEP)
    tables: dict[str, SensitivityTable] = {}
    seconds: dict[str, float] = {}
    for method in dict.fromkeys((config.method, *config.baselines)):
        started = time.perf_counter()
        tables[method] = sensitivities(
            policy,
            calibration,
            method=method,
            bits=BITS,
            probes=config.probes,
            exact_share=config.exact_share,
            seed=config.seed,
            # The inputs are the same for every method, so they are measured once.
            statistics=tables[config.method].statistics if tables else None,
            mesh=mesh,
            split_weights=config.split_weights,
            streamed=config.streamed,
            joint=not config.streamed,
            # Error feedback needs covariances, [k, k] for every layer.
            quantizer=QuantizerSettings(rounding="nearest" if config.streamed else "feedback"),
            store=store,
            progress=prefixed(progress, method),
        )
        seconds[method] = time.perf_counter() - started
    validation = None
    if config.validate and config.method != "exact":
        table = tables[config.method]
        validation = validate(
            policy,
            calibration,
            table,
            channels=config.validate,
            frames=config.validate_frames,
            seed=config.seed,
            progress=prefixed(progress, "validation"),
        )
    if sharding.is_main_process():
        _write(config, tables, seconds, validation)
    return validation


def check_methods(config: SensitivityConfig) -> None:
    """Checks the methods' names.

    Raises:
        InputError: one is unknown; the message suggests close ones.
    """
    if config.streamed and (config.validate or config.baselines):
        raise InputError(
            "a streamed sweep takes neither --validate, --baselines nor --thorough: these need all "
            "weights in memory"
        )
    for method in (config.method, *config.baselines):
        if method not in METHODS:
            raise InputError(unknown("sensitivity method", method, METHODS))


def check_budget(policy: Policy, budget_bits: float) -> None:
    """Checks, before anything is measured, that a budget can be met.

    Raises:
        BudgetError: the smallest option of every channel takes more; the message says how much.
        InputError: a weight is not finite.
    """
    index = policy_index(policy)
    least = int(option_sizes(index, BITS).min(axis=1).sum())
    if least > int(budget_bits * index.num_weights / 8):
        bits = -(-800 * least // index.num_weights) / 100
        raise BudgetError(
            f"a budget of {budget_bits:g} bits per weight cannot be met: biases and index of the "
            f"{len(index):,} channels alone take {least:,} bytes; give at least {bits:g} bits"
        )


def load_validation(folder: Path) -> SavedValidation | None:
    """Reads validation.json; None if the validation was skipped."""
    path = folder / files.VALIDATION
    return files.read_result(path, SavedValidation) if path.exists() else None


def load_seconds(folder: Path, method: str) -> float | None:
    """Reads how long a method took; None if it was not recorded."""
    path = folder / files.TIMES
    return files.read_json(path, kind=TIMES_KIND)["seconds"].get(method) if path.exists() else None


def _write(
    config: SensitivityConfig,
    tables: dict[str, SensitivityTable],
    seconds: dict[str, float],
    validation: Validation | None,
) -> None:
    """Replaces all files of this stage, so that none of an earlier run remains."""
    for old in (*config.out.glob("sensitivity*.safetensors"), config.out / files.VALIDATION):
        old.unlink(missing_ok=True)
    if (statistics := tables[config.method].statistics) is not None:
        statistics.save(config.out / files.STATISTICS)
    for method, table in tables.items():
        table.save(files.sensitivity_file(config.out, method, main=config.method))
    header = {"format": TIMES_KIND, "version": 1}
    write_json(config.out / files.TIMES, {**header, "seconds": seconds})
    if validation is not None:
        made_from = files.made_from(tables[config.method])
        saved = SavedValidation(made_from=made_from, **vars(validation))
        write_json(config.out / files.VALIDATION, to_plain(saved))
    shutil.rmtree(config.out / files.SWEEP, ignore_errors=True)
