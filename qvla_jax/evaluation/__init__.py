"""The quality of a quantized policy: offline action error, and success in closed loop.

Names are loaded when they are first used: the simulator processes of a closed loop import modules
of this package, and need no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvla_jax.evaluation.closed_loop import run_episodes as run_episodes
    from qvla_jax.evaluation.offline import ActionErrors as ActionErrors
    from qvla_jax.evaluation.offline import Predictions as Predictions
    from qvla_jax.evaluation.offline import action_errors as action_errors
    from qvla_jax.evaluation.offline import evaluate as evaluate
    from qvla_jax.evaluation.offline import gripper_flips as gripper_flips
    from qvla_jax.evaluation.offline import predict as predict
    from qvla_jax.evaluation.paired import Comparison as Comparison
    from qvla_jax.evaluation.paired import Success as Success
    from qvla_jax.evaluation.paired import compare as compare

_LAZY = {
    "ActionErrors": "offline",
    "Comparison": "paired",
    "Predictions": "offline",
    "Success": "paired",
    "action_errors": "offline",
    "compare": "paired",
    "evaluate": "offline",
    "gripper_flips": "offline",
    "predict": "offline",
    "run_episodes": "closed_loop",
}

__all__ = [
    "ActionErrors",
    "Comparison",
    "Predictions",
    "Success",
    "action_errors",
    "compare",
    "evaluate",
    "gripper_flips",
    "predict",
    "run_episodes",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the lazily loaded names as well."""
    return sorted({*globals(), *__all__})
