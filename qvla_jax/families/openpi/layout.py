"""The layout of the networks of pi0 and pi0.5."""

from typing import Final

from qvla_jax.families.layout import Layout
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network import unread_modules
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.quantization.layers import LayerRules

# Layers of one module that take the same input.
SAME_INPUT: Final = (
    ("query", "key", "value"),
    ("q_einsum", "k_einsum", "v_einsum"),
    ("q_einsum_1", "k_einsum_1", "v_einsum_1"),
    ("gate", "up"),
)
# What makes the conditioning of all steps out of times alone.
_CONDITIONING: Final = r"time_mlp_(in|out)|PaliGemma\.llm\..*Dense_0"
_EXPERT: Final = r"PaliGemma\.llm\.layers\.\d+\.(attn\.\w+_1|mlp_1\.)"


def layout(config: OpenpiConfig) -> Layout:
    """The layout of a configuration's network.

    Quantized are the vision tower, the language model's blocks and the action expert's. The
    projections of images, state and actions and all that time passes through keep their bits.
    """
    robot = None if config.robot is None else ROBOTS[config.robot]
    entries = config.action_dim if robot is None else robot.action_dim
    steps = config.executed_steps
    return Layout(
        rules=LayerRules(
            include=(
                r"PaliGemma\.img\.(embedding|Transformer\.)",
                r"PaliGemma\.llm\.layers\.\d+\.(attn|mlp|mlp_1)\.",
            )
        ),
        kept=(
            r"PaliGemma\.img\.head",
            r"action_(in|out)_proj",
            r"state_proj",
            r"action_time_mlp_(in|out)",
            _CONDITIONING,
        ),
        stages=(
            r"PaliGemma\.img\.(embedding|head)",
            r"PaliGemma\.img\.Transformer\.encoderblock\.\d+",
            # Called once for the prefix, and for the suffix once a step.
            r"PaliGemma\.llm\.layers\.\d+",
            r"action_(in|out)_proj|state_proj|action_time_mlp_(in|out)|time_mlp_(in|out)",
        ),
        parts=(
            r"PaliGemma\.img",
            r".+\.(MultiHeadDotProductAttention_0|MlpBlock_0)",
            r"PaliGemma\.llm\.layers\.\d+\.mlp(_1)?",
        ),
        independent=(
            # Conditioning is made of times alone, pi0's state token of the state alone.
            (_CONDITIONING, r"PaliGemma\.(?!.*Dense_0)|action_|state_proj"),
            (r"state_proj", r"PaliGemma\.|action_"),
        ),
        same_input=SAME_INPUT,
        # Conditioning is computed once for all calls.
        reads=(
            (_CONDITIONING, 0),
            (rf"{_EXPERT}|action_", config.num_steps),
        ),
        unread=unread_modules(config),
        module_types=((r"\.(layers|encoderblock)\.\d+", ""), (r"^PaliGemma\.", "")),
        short_names=(
            (r"PaliGemma\.llm\.layers\.", "llm "),
            (r"PaliGemma\.img\.Transformer\.encoderblock\.", "siglip "),
            (r"PaliGemma\.img\.", "siglip "),
            (r"MultiHeadDotProductAttention_0", "attn"),
            (r"MlpBlock_0", "mlp"),
            (r"_einsum", ""),
        ),
        groups=(r"PaliGemma\.img", r"PaliGemma\.llm", r"[^.]+"),
        action_entries=tuple(range(entries)),
        # Joints are relative to the state, grippers are not.
        grippers=() if robot is None else tuple(i for i, r in enumerate(robot.relative) if not r),
        # A shorter chunk is executed whole.
        executed_steps=None if steps is None or steps >= config.action_horizon else steps,
    )
