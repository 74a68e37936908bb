"""The stages: calibrate, sensitivity, allocate, quantize, evaluate, report; `run` for all.

Each takes a frozen settings dataclass and writes its result to one folder, where the next one finds
it; each checks that the files it finds belong together.
"""

from qvla_jax.pipeline.allocate import Allocation, Allocations, allocate
from qvla_jax.pipeline.calibrate import calibrate, load_calibration
from qvla_jax.pipeline.compare_solvers import CompareSolversConfig, compare_solvers
from qvla_jax.pipeline.configs import (
    AllocateConfig,
    CalibrateConfig,
    EvaluateConfig,
    PackConfig,
    QuantizeConfig,
    ReportConfig,
    RunConfig,
    SensitivityConfig,
    ValidateConfig,
)
from qvla_jax.pipeline.evaluate import count_parameters, evaluate
from qvla_jax.pipeline.measure_solvers import MeasureSolversConfig, measure_solvers
from qvla_jax.pipeline.methods import MethodConfig, quantize_by_methods
from qvla_jax.pipeline.pack import pack
from qvla_jax.pipeline.quantize import quantize
from qvla_jax.pipeline.report import report
from qvla_jax.pipeline.run import run
from qvla_jax.pipeline.sensitivity import sensitivity
from qvla_jax.pipeline.study import StudyConfig, study
from qvla_jax.pipeline.validate import validate

__all__ = [
    "AllocateConfig",
    "Allocation",
    "Allocations",
    "CalibrateConfig",
    "CompareSolversConfig",
    "EvaluateConfig",
    "MeasureSolversConfig",
    "MethodConfig",
    "PackConfig",
    "QuantizeConfig",
    "ReportConfig",
    "RunConfig",
    "SensitivityConfig",
    "StudyConfig",
    "ValidateConfig",
    "allocate",
    "calibrate",
    "compare_solvers",
    "count_parameters",
    "evaluate",
    "load_calibration",
    "measure_solvers",
    "pack",
    "quantize",
    "quantize_by_methods",
    "report",
    "run",
    "sensitivity",
    "study",
    "validate",
]
