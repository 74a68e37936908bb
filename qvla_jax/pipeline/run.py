"""The whole pipeline, stage by stage."""

from qvla_jax.inference import load_policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import allocate, load_tables
from qvla_jax.pipeline.calibrate import calibrate, check_frames
from qvla_jax.pipeline.configs import RunConfig
from qvla_jax.pipeline.evaluate import check_disjoint, evaluate, heldout_set
from qvla_jax.pipeline.quantize import quantize
from qvla_jax.pipeline.report import report, save_times
from qvla_jax.pipeline.sensitivity import check_budget, check_estimators, sensitivity
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.report.contents import Report
from qvla_jax.solvers.registry import get_solver
from qvla_jax.stage_times import StageTimes


@in_32_bits
def run(config: RunConfig, *, progress: Progress = no_progress) -> Report:
    """Calibrates, measures, allocates, packs, evaluates and reports.

    >>> import qvla_jax
    >>> from pathlib import Path
    >>> qvla_jax.random_policy("tiny-test").save("tiny")
    >>> report = qvla_jax.run(
    ...     qvla_jax.RunConfig(
    ...         out=Path("run"), model="tiny", budget_bits=8.0, frames=2, validate=0,
    ...         baselines=(), solvers=("greedy:marginal",), sweep=(), match_uniform=(),
    ...         eval_frames=2, uniform_bits=(), latency_calls=0,
    ...     )
    ... )  # fmt: skip
    >>> [method.label for method in report.methods]
    ['full precision', 'action sensitivity, greedy:marginal, 8 bits']
    >>> Path("run/policy.qvla").exists(), Path("run/report.html").exists()
    (True, True)

    All inputs are checked before the first long stage and before the first file is written.

    Returns:
        The content of report.json (docs/file_formats.md).

    Raises:
        InputError: an input cannot be used.
    """
    files.check_folder(config.out)
    for name in config.solvers:
        get_solver(name)
    check_estimators(config)
    with StageTimes(progress, first="load") as times:
        return _run(config, times)


def _run(config: RunConfig, times: StageTimes) -> Report:
    policy = load_policy(config.model, progress=times, **config.said())
    horizon = policy.config.action_horizon
    check_budget(policy, config.budget_bits)
    heldout = heldout_set(config, horizon=horizon)
    check_frames(policy, heldout)
    calibration = calibrate(config, horizon=horizon, progress=times)
    check_frames(policy, calibration)
    check_disjoint(calibration, heldout)
    sensitivity(config, policy=policy, calibration=calibration, progress=times)
    allocate(config, progress=times)
    # Loaded once: its quantizer keeps what it computed for each layer.
    table = load_tables(config.out)[0]
    quantize(config, policy=policy, table=table, progress=times)
    evaluate(config, policy=policy, table=table, progress=times)
    save_times(config.out, times.until_now(), files.made_from(table))
    return report(config, progress=times)
