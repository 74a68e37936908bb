"""What a UniVLA directory adds to an OpenVLA one: latent action tokens, and the action decoder."""

from pathlib import Path
from typing import Final

from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.directory import component_shape
from qvla_jax.families.prismatic.config import LatentActionConfig, OpenVLAConfig

# The tensors do not determine the number of heads; the public code uses heads of this width.
_HEAD_DIM: Final = 64


def decoder_sizes(path: Path, action_dim: int) -> tuple[int, LatentActionConfig]:
    """Chunk length and sizes of an action decoder.

    Raises:
        CheckpointError: a tensor that determines a size is missing or does not fit.
    """
    rows, dim = component_shape(path, "proj.0.weight", dims=2)
    if rows % action_dim or not rows:
        raise CheckpointError(
            f"{path}: tensor 'proj.0.weight' has {rows} rows, expected a multiple of {action_dim}, "
            "the entries of an action"
        )
    _, hidden = component_shape(path, "visual_pool.mlp.1.weight", dims=2)
    heads = max(dim // _HEAD_DIM, 1)
    if dim % heads:
        raise CheckpointError(
            f"{path}: tensor 'proj.0.weight' is for vectors of {dim} entries, which do not divide "
            f"into heads of {_HEAD_DIM}"
        )
    return rows // action_dim, LatentActionConfig(embed_dim=dim, num_heads=heads, mlp_dim=hidden)


def check_latent_tokens(config: OpenVLAConfig, first: int | None, folder: Path) -> None:
    """Checks that a directory has the action decoder if its tokenizer has latent action tokens.

    Args:
        config: as read from the directory.
        first: the tokenizer's id of `<ACT_0>`; None if it has no such token.
        folder: the directory, for errors.

    Raises:
        CheckpointError: the decoder is missing, or the tokens are not where it expects them.
    """
    if first is None:
        return
    if config.latent_action is None:
        raise CheckpointError(
            f"{folder}: the tokenizer holds UniVLA's latent action tokens, but there is no "
            "action_decoder*.pt; put the fine-tuned decoder beside the weights"
        )
    if first != config.pad_token_id + 1:
        raise CheckpointError(
            f"{folder}: the tokenizer gives <ACT_0> the id {first}, expected "
            f"{config.pad_token_id + 1}, behind the padding token"
        )
