"""How much the action changes when one output channel is quantized."""

from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.sensitivity.methods import ESTIMATORS, sensitivities
from qvla_jax.sensitivity.ranks import spearman
from qvla_jax.sensitivity.statistics import input_statistics
from qvla_jax.sensitivity.store import SweepStore
from qvla_jax.sensitivity.table import SensitivityTable
from qvla_jax.sensitivity.validation import joint_error, validate

__all__ = [
    "ESTIMATORS",
    "ChannelIndex",
    "SensitivityTable",
    "SweepStore",
    "input_statistics",
    "joint_error",
    "sensitivities",
    "spearman",
    "validate",
]
