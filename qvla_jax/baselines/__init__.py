"""Published quantizers to compare with, through qwix where it has them (docs/baselines.md).

Every method takes the full-precision policy and calibration frames and returns a policy that runs
from packed weights, whose bytes are those that allocations are counted by.
"""

from qvla_jax.baselines.moments import InputMoments, input_moments
from qvla_jax.baselines.registry import METHODS, check_setting, quantize_by, title
from qvla_jax.baselines.settings import Setting

__all__ = [
    "METHODS",
    "InputMoments",
    "Setting",
    "check_setting",
    "input_moments",
    "quantize_by",
    "title",
]
