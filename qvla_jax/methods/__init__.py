"""Methods by name: published quantizers, through qwix where it has them, and our own.

A method is a recipe (`recipes.RECIPES`), and the stages carry it out (`stages`): full-precision
policy and calibration frames in, a policy that runs from packed weights out, whose bytes are
counted as for allocations (docs/methods.md).
"""

from qvla_jax.methods.measurements import Measurements, SweepSettings
from qvla_jax.methods.moments import InputMoments, input_moments
from qvla_jax.methods.recipe import Recipe
from qvla_jax.methods.recipes import RECIPES, check_setting, title
from qvla_jax.methods.settings import Setting
from qvla_jax.methods.stages import quantize_by

__all__ = [
    "RECIPES",
    "InputMoments",
    "Measurements",
    "Recipe",
    "Setting",
    "SweepSettings",
    "check_setting",
    "input_moments",
    "quantize_by",
    "title",
]
