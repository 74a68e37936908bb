"""How good a quantized policy is: offline action error (closed loop and latency are to come)."""

from qvla_jax.evaluation.offline import (
    ActionErrors,
    Predictions,
    action_errors,
    gripper_flips,
    predict,
)

__all__ = ["ActionErrors", "Predictions", "action_errors", "gripper_flips", "predict"]
