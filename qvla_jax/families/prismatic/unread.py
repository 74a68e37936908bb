"""Weights that the public checkpoints hold and inference never reads."""

from typing import Any

from flax import nnx

from qvla_jax.families.prismatic.network.openvla import Prismatic


def drop_unread(model: Prismatic) -> None:
    """Removes, in place, what no policy of this kind reads; the model may be abstract.

    That is everything after the feature block of a tower (its last block, final norm and attention
    pool in the public checkpoints) and, with a regression head, the language model's output layer.
    """
    backbone = model.vision_backbone
    for tower in (backbone.featurizer, backbone.fused_featurizer):
        tower.blocks = nnx.List(list(tower.blocks)[: tower.config.feature_block + 1])
        tower.norm = tower.attn_pool = None
    if model.config.decoding == "l1":
        language_model: Any = model.language_model  # whose type promises an output layer
        language_model.lm_head = None


def is_dropped(model: Prismatic) -> bool:
    """Whether `drop_unread` removed anything from this model."""
    backbone, language_model = model.vision_backbone, model.language_model
    if model.config.decoding == "l1" and language_model.lm_head is None:
        return True
    return any(
        len(tower.blocks) < tower.config.depth
        or (tower.config.final_norm and tower.norm is None)
        or (tower.config.attention_pool and tower.attn_pool is None)
        for tower in (backbone.featurizer, backbone.fused_featurizer)
    )
