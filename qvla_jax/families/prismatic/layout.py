"""The layout of Prismatic networks: OpenVLA, OpenVLA-OFT and UniVLA."""

from typing import Final

from qvla_jax.families.layout import Layout
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.quantization.layers import LayerRules

_TOWERS: Final = ("featurizer", "fused_featurizer")
# Layers of one module that take the same input.
SAME_INPUT: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Of one arm's action.
_NAMES: Final = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def layout(config: OpenVLAConfig) -> Layout:
    """The layout of a configuration's network.

    The quantized layers are those of QVLA: the vision towers (patch embeddings too) and the
    language model's blocks. The output layer, projectors and heads keep 16 bits.
    """
    first, second = (rf"vision_backbone\.{tower}(\.|$)" for tower in _TOWERS)
    unread = [
        f"vision_backbone.{name}.{module}"
        for name, tower in zip(_TOWERS, config.vision, strict=True)
        for module in (
            *(f"blocks.{i}" for i in range(tower.feature_block + 1, tower.depth)),
            *(("norm",) if tower.final_norm else ()),
            *(("attn_pool",) if tower.attention_pool else ()),
        )
    ]
    if config.decoding == "l1":
        unread.append("language_model.lm_head")
    decoded = 1 if config.decoding == "l1" else config.num_decoded_tokens
    return Layout(
        rules=LayerRules(include=(r"vision_backbone\.", r"language_model\.model\.")),
        kept=(
            r"language_model\.lm_head",
            r"projector\.",
            r"proprio_projector\.",
            r"action_head\.",
            r"action_decoder\.",
        ),
        stages=(r".+\.(blocks|layers)\.\d+", r".+\.patch_embed", r"(proprio_)?projector"),
        parts=(
            r"vision_backbone",
            r".+\.(blocks|layers)\.\d+\.(block\.)?(attn|self_attn|mlp)",
        ),
        independent=(
            # The two towers do not see each other, and proprio sees no image.
            (first, second),
            (second, first),
            (r"proprio_projector(\.|$)", r"(vision_backbone|projector)\."),
        ),
        same_input=SAME_INPUT,
        # The prompt's pass gives the first token.
        reads=((r"language_model\.", decoded),),
        unread=tuple(unread),
        module_types=((r"\.(model\.layers|blocks)\.\d+", ""), (r"^vision_backbone\.", "")),
        short_names=(
            (r"language_model\.model\.layers\.", "llm "),
            (r"vision_backbone\.fused_featurizer\.", "siglip "),
            (r"vision_backbone\.featurizer\.", "dino "),
            (r"blocks\.", ""),
        ),
        groups=(r"(vision_backbone|language_model)\.[^.]+", r"[^.]+"),
        action_entries=tuple(range(config.action_dim)),
        grippers=(config.action_dim - 1,),
        action_names=_NAMES if config.action_dim == len(_NAMES) else (),
    )
