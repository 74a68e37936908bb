"""AdamW or Muon, with a learning rate that warms up, stays constant, and decays at the end.

With this schedule (warmup-stable-decay) a run can be extended from any checkpoint before the decay,
without planning its length in advance.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from qvla_jax import sharding
from qvla_jax.training.config import TrainConfig

# Scales Muon's orthogonal updates to the size of AdamW's, so that one learning rate and one weight
# decay serve both (Liu et al., 2025, "Muon is scalable for LLM training", section 2.2).
_MUON_UPDATE_RMS: Final = 0.2
# Axes of matrices that lie side by side.
_OF_STACKS: Final = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
# What is no matrix, beside the stacks.
_OTHERS: Final = "others"


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
        rule = _on_stacks(
            contrib.muon(
                1.0,
                weight_decay=config.weight_decay,
                consistent_rms=_MUON_UPDATE_RMS,
                muon_weight_dimension_numbers=_dimensions,
            )
        )
    else:
        rule = optax.adamw(
            1.0,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _on_stacks(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule for stacks of matrices, applied to a tree of them.

    Muon's work on a matrix does not depend on the batch, so that every device would do all of it.
    Of a stack each does a share, and few large products compile and run faster than many small.
    """

    def init(params: Any) -> Any:
        return rule.init(_stacks(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacks, state = rule.update(_split(_stacks(updates)), state, _stacks(params))
        return _unstacked(_whole(stacks), updates), _whole(state)

    return optax.GradientTransformation(init, update)


def _dimensions(stacks: Any) -> Any:
    """Axes of the matrices of each stack; None where Adam takes over."""
    return {name: None if name == _OTHERS else _OF_STACKS for name in stacks}


def _stacks(tree: Any) -> dict[str, Any]:
    """Matrices of each shape side by side, [n, r, c]; and a list of all else."""
    groups: dict[str, Any] = {_OTHERS: []}
    for leaf in jax.tree.leaves(tree):
        name = "x".join(map(str, leaf.shape)) if leaf.ndim == 2 else _OTHERS
        groups.setdefault(name, []).append(leaf)
    return {k: leaves if k == _OTHERS else jnp.stack(leaves) for k, leaves in groups.items()}


def _unstacked(stacks: dict[str, Any], tree: Any) -> Any:
    """The inverse of `_stacks`, in the form of a tree."""
    leaves, form = jax.tree.flatten(tree)
    rest = {name: iter(stack) for name, stack in stacks.items()}
    names = ("x".join(map(str, leaf.shape)) if leaf.ndim == 2 else _OTHERS for leaf in leaves)
    return jax.tree.unflatten(form, [next(rest[name]) for name in names])


def _split(stacks: dict[str, Any]) -> dict[str, Any]:
    """Each device gets its share of every stack."""
    placed = NamedSharding(sharding.data_mesh(), PartitionSpec(sharding.DATA_AXIS))
    return {
        name: stack if name == _OTHERS else jax.lax.with_sharding_constraint(stack, placed)
        for name, stack in stacks.items()
    }


def _whole(tree: Any) -> Any:
    """Every device gets all."""
    placed = NamedSharding(sharding.data_mesh(), PartitionSpec())
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, placed), tree)
