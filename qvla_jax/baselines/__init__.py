"""Methods by name: published quantizers, through qwix where it has them, and our own.

Every method takes the full-precision policy and calibration frames and returns a policy that runs
from packed weights, whose bytes are counted as for allocations (docs/baselines.md).
"""

from qvla_jax.baselines.measurements import Measurements
from qvla_jax.baselines.moments import InputMoments, input_moments
from qvla_jax.baselines.registry import METHODS, check_setting, quantize_by, title
from qvla_jax.baselines.settings import Setting

__all__ = [
    "METHODS",
    "InputMoments",
    "Measurements",
    "Setting",
    "check_setting",
    "input_moments",
    "quantize_by",
    "title",
]
