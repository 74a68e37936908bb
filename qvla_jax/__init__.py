"""Channel-wise mixed-precision quantization of vision-language-action policies, in JAX.

    import qvla_jax

    policy = qvla_jax.load_policy("libero-mini")
    calibration = qvla_jax.calibration_set("bundled", frames=128)
    table = qvla_jax.sensitivities(policy, calibration)
    allocation = qvla_jax.allocate(table, budget_bits=4.0)
    quantized = qvla_jax.quantize(policy, allocation)
    quantized.save("mini.qvla")

    heldout = qvla_jax.calibration_set("bundled", frames=64, split="heldout")
    print(qvla_jax.evaluate(quantized, heldout, reference=policy))
    qvla_jax.serve(quantized, qvla_jax.ServeConfig(port=8000))

`run(RunConfig(...))` runs the same pipeline and writes its files and report. `RunConfig` and
`ServeConfig` hold the options of `qvla run` and `qvla serve`.

The public names are loaded when they are first used: `import qvla_jax` itself imports no JAX,
TensorFlow or solver library and touches no device. With JAX 0.10 it adds a flag to XLA_FLAGS
(`qvla_jax.compiler`): import it before JAX makes its first device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qvla_jax.compiler import avoid_wrong_sums as _avoid_wrong_sums

if TYPE_CHECKING:
    from qvla_jax import data as data
    from qvla_jax import solvers as solvers
    from qvla_jax.allocation import allocate as allocate
    from qvla_jax.data.calibration import calibration_set as calibration_set
    from qvla_jax.evaluation.offline import evaluate as evaluate
    from qvla_jax.inference import Policy as Policy
    from qvla_jax.inference import load_policy as load_policy
    from qvla_jax.inference import random_policy as random_policy
    from qvla_jax.inference.quantize import quantize as quantize
    from qvla_jax.pipeline import RunConfig as RunConfig
    from qvla_jax.pipeline import run as run
    from qvla_jax.sensitivity import sensitivities as sensitivities
    from qvla_jax.serving import ServeConfig as ServeConfig
    from qvla_jax.serving import serve as serve

__version__ = "0.1.0"

_avoid_wrong_sums()

# Public name -> module that has it.
_LAZY = {
    "Policy": "qvla_jax.inference",
    "RunConfig": "qvla_jax.pipeline",
    "ServeConfig": "qvla_jax.serving",
    "allocate": "qvla_jax.allocation",
    "calibration_set": "qvla_jax.data.calibration",
    "evaluate": "qvla_jax.evaluation.offline",
    "load_policy": "qvla_jax.inference",
    "quantize": "qvla_jax.inference.quantize",
    "random_policy": "qvla_jax.inference",
    "run": "qvla_jax.pipeline",
    "sensitivities": "qvla_jax.sensitivity",
    "serve": "qvla_jax.serving",
}
_SUBMODULES = ("data", "solvers")

__all__ = [
    "Policy",
    "RunConfig",
    "ServeConfig",
    "__version__",
    "allocate",
    "calibration_set",
    "data",
    "evaluate",
    "load_policy",
    "quantize",
    "random_policy",
    "run",
    "sensitivities",
    "serve",
    "solvers",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name in _SUBMODULES:
        value = importlib.import_module(f"qvla_jax.{name}")
    elif name in _LAZY:
        from qvla_jax import devices

        devices.import_jax()  # or an error that names the offending variable
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'qvla_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the lazily loaded names as well."""
    return sorted({*globals(), *__all__})
