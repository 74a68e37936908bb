"""AdamW, with a learning rate that warms up, stays, and decays over the last steps.

With this schedule (warmup-stable-decay) a run can be prolonged from any checkpoint before the decay
without having planned its length.
"""

import jax
import optax

from qvla_jax.training.config import TrainConfig


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
    """AdamW with clipped gradients; vectors (norms, biases) are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
