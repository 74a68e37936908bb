"""AdamW or Muon, with a learning rate that warms up, stays constant, and decays at the end.

With this schedule (warmup-stable-decay) a run can be extended from any checkpoint before the decay,
without planning its length in advance.
"""

import jax
import optax
from optax import contrib

from qvla_jax.training.config import TrainConfig

# Scales Muon's orthogonal updates to the size of AdamW's, so that one learning rate and one weight
# decay serve both (Liu et al., 2025, "Muon is scalable for LLM training", section 2.2).
_MUON_UPDATE_RMS = 0.2


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, a constant, and a linear decay to zero over the last steps."""
    decay_from = config.steps - config.decay_steps
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.peak_learning_rate, config.warmup_steps),
            optax.constant_schedule(config.peak_learning_rate),
            optax.linear_schedule(config.peak_learning_rate, 0.0, max(config.decay_steps, 1)),
        ],
        [config.warmup_steps, max(decay_from, config.warmup_steps)],
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The recipe's optimizer with clipped gradients; vectors (norms, biases) are not decayed.

    Muon takes the matrices and leaves everything else to Adam. Updates are those of a learning rate
    of 1: times `learning_rate`, which the compiled step takes as a number, they are the step's.
    """
    if config.optimizer == "muon":
        rule = contrib.muon(1.0, weight_decay=config.weight_decay, consistent_rms=_MUON_UPDATE_RMS)
    else:
        rule = optax.adamw(
            1.0,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
