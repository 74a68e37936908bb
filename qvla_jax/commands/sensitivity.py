"""`qvla sensitivity`: what each channel costs, on one host or several."""

import dataclasses

from qvla_jax import devices, pipeline, sharding
from qvla_jax.errors import InputError
from qvla_jax.output import Result
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars
from qvla_jax.report.terminal import spearman_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pipeline.SensitivityConfig):
    """Measures what each output channel costs at each bit-width; writes sensitivity.safetensors.

    A killed run resumes where it stopped when it is started again. On several hosts, start it on
    each with the same options and --distributed, or its own --process; --out must hold the same
    calibration.json everywhere, and process 0 writes the results.
    """

    # Join the processes that the cluster started: on Cloud TPU, or under SLURM, Kubernetes or Open
    # MPI.
    distributed: bool = False
    # Elsewhere: HOST:PORT of process 0, for a sweep of several processes.
    coordinator: str | None = None
    # Number of processes, and the number of this one.
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distributed and self.coordinator is not None:
            raise InputError("--distributed finds the coordinator by itself: drop one of the two")

    @property
    def joins(self) -> bool:
        """Whether this process is one of several, which join before there are devices."""
        return self.distributed or self.coordinator is not None


def main(config: Config) -> Result:
    """Measures the sensitivities."""
    if config.distributed:
        sharding.join_cluster()
    elif config.coordinator is not None:
        sharding.join_processes(config.coordinator, config.processes, config.process)
    if config.joins:
        devices.ready()  # after joining, which must come first
    with ProgressBars() as progress:
        ranks = pipeline.sensitivity(config, progress=progress)
    path = config.out / files.SENSITIVITY
    content = {"estimator": config.estimator, "file": str(path), "ranks": to_plain(ranks)}
    if not sharding.is_main_process():
        return Result(content, ())
    lines = () if ranks is None else (spearman_line(ranks, config.estimator),)
    return Result(content, (*lines, f"Sensitivities: {path}"))
