"""Channel-wise mixed-precision quantization of vision-language-action policies, in JAX.

The public names below are loaded when they are first used: `import qvla_jax` itself imports no JAX,
TensorFlow or solver library and touches no device.

    policy = qvla_jax.load_policy("libero-mini")
    calibration = qvla_jax.calibration_set("bundled", frames=128)
    table = qvla_jax.sensitivities(policy, calibration)
    problem = table.problem(budget_bits=4.0)
    solution = qvla_jax.solvers.solve(problem, "greedy:marginal")
    quantized = qvla_jax.quantize(policy, table.bits_of(solution))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvla_jax import data as data
    from qvla_jax import solvers as solvers
    from qvla_jax.data.calibration import calibration_set as calibration_set
    from qvla_jax.inference import load_policy as load_policy
    from qvla_jax.quantization import quantize as quantize
    from qvla_jax.sensitivity import sensitivities as sensitivities

__version__ = "0.1.0"

# Public name -> module that has it.
_LAZY = {
    "calibration_set": "qvla_jax.data.calibration",
    "load_policy": "qvla_jax.inference",
    "quantize": "qvla_jax.quantization",
    "sensitivities": "qvla_jax.sensitivity",
}
_SUBMODULES = ("data", "solvers")

__all__ = [
    "__version__",
    "calibration_set",
    "data",
    "load_policy",
    "quantize",
    "sensitivities",
    "solvers",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name in _SUBMODULES:
        value = importlib.import_module(f"qvla_jax.{name}")
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'qvla_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the lazily loaded names as well."""
    return sorted({*globals(), *__all__})
