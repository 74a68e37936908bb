"""Methods by name: published quantizers, through qwix where it has them, and our own.

Every method takes the full-precision policy and calibration frames and returns a policy that runs
from packed weights, whose bytes are counted as for allocations (docs/methods.md).
"""

from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.moments import InputMoments, input_moments
from qvla_jax.methods.registry import METHODS, check_setting, quantize_by, title
from qvla_jax.methods.settings import Setting

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
