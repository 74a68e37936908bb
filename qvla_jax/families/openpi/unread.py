"""Weights that checkpoints hold and no call of a policy reads, which packed policies leave out.

Of the prefix that is everything behind its last keys and values. Of pi0.5 it is also what makes the
modulations of all steps out of times alone: the modulations themselves are kept instead, which take
a fiftieth of the memory.
"""

from typing import Any

import jax

from qvla_jax.families.openpi.network import FlowMatching


def drop_unread(model: FlowMatching) -> None:
    """Removes, in place, what no call reads; the model may be abstract."""
    llm: Any = model.PaliGemma.llm  # whose types promise all parts
    last = llm.layers[-1]
    last.attn.q_einsum = last.attn.attn_vec_einsum = None
    last.pre_ffw_norm = last.mlp = llm.final_norm = None
    with jax.default_matmul_precision("float32"):
        model.keep_conditioning()


def is_dropped(model: FlowMatching) -> bool:
    """Whether `drop_unread` removed anything from this model."""
    return model.PaliGemma.llm.final_norm is None
