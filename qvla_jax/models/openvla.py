"""OpenVLA-OFT: towers, projector, Llama with parallel decoding, regression head.

Sequence of the language model (moojink/openvla-oft): BOS, patches of every image, the proprio
token, the rest of the prompt with the empty token last, h*a zeroed action placeholders, the stop
token, padding. Every position attends to every position that is not padding. The head reads h*a
final-norm states from the empty token's own position on: as in next-token prediction, a state
stands one place before the entry that it predicts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float, Int, UInt8
from qvla_jax.config import OpenVLAConfig
from qvla_jax.models.action_head import L1RegressionActionHead
from qvla_jax.models.llama import LlamaForCausalLM, bidirectional_mask
from qvla_jax.models.projector import PrismaticProjector, ProprioProjector
from qvla_jax.models.vision import VisionBackbone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the model takes; the first axis of every array is the batch."""

    # Images of v cameras, already at the towers' size.
    images: UInt8[Array, "b v H W 3"]
    # The prompt from BOS to the empty token, padded on the right.
    input_ids: Int[Array, "b t"]
    # Tokens of each prompt that are not padding.
    prompt_length: Int[Array, " b"]
    # Normalized proprio; None for policies that take none.
    proprio: Float[Array, "b p"] | None = None


class OpenVLA(nnx.Module):
    """The policy network: inputs to a normalized action chunk."""

    def __init__(self, config: OpenVLAConfig, *, rngs: nnx.Rngs):
        if config.decoding != "l1":
            raise NotImplementedError(
                f"{config.name}: decoding {config.decoding!r} is not ported yet; only 'l1' is"
            )
        self.config = config
        llm_dim = config.text.hidden_size
        vision_dim = sum(tower.embed_dim for tower in config.vision)
        self.vision_backbone = VisionBackbone(config.vision, rngs=rngs)
        self.projector = PrismaticProjector(vision_dim, llm_dim, rngs=rngs)
        self.language_model = LlamaForCausalLM(config.text, rngs=rngs)
        self.proprio_projector = (
            ProprioProjector(config.proprio_dim, llm_dim, rngs=rngs) if config.proprio_dim else None
        )
        self.action_head = L1RegressionActionHead(
            llm_dim, config.action_horizon, config.action_dim, rngs=rngs
        )

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b h a"]:
        """Normalized action chunk of each observation."""
        prefix = self.projector(self.vision_backbone(inputs.images))
        if self.proprio_projector is not None:
            if inputs.proprio is None:
                raise ValueError(f"{self.config.name} takes proprio, but the inputs hold none")
            prefix = jnp.concatenate([prefix, self.proprio_projector(inputs.proprio)], axis=1)
        text, valid = self._text_embeddings(inputs)
        embeddings = jnp.concatenate([text[:, :1], prefix, text[:, 1:]], axis=1)
        valid = jnp.concatenate(
            [valid[:, :1], jnp.ones(prefix.shape[:2], bool), valid[:, 1:]], axis=1
        )
        states = self.language_model.model(embeddings, bidirectional_mask(valid))
        return self.action_head(self._action_states(states, prefix.shape[1], inputs.prompt_length))

    def _text_embeddings(
        self, inputs: ModelInputs
    ) -> tuple[Float[Array, "b t c"], Bool[Array, "b t"]]:
        """Prompt, zeroed action placeholders and stop token; and which places are not padding."""
        config = self.config
        length = inputs.prompt_length[:, None]
        ids = jnp.pad(inputs.input_ids, ((0, 0), (0, config.num_action_tokens + 1)))
        place = jnp.arange(ids.shape[1])[None]
        stop_at = length + config.num_action_tokens
        is_placeholder = (place >= length) & (place < stop_at)
        ids = jnp.where(is_placeholder, config.placeholder_token_id, ids)
        ids = jnp.where(place == stop_at, config.stop_token_id, ids)
        ids = jnp.where(place > stop_at, config.pad_token_id, ids)
        embeddings = self.language_model.model.embed_tokens(ids)
        zero = jnp.zeros((), embeddings.dtype)
        return jnp.where(is_placeholder[:, :, None], zero, embeddings), place <= stop_at

    def _action_states(
        self,
        states: Float[Array, "b t c"],
        num_prefix: int,
        prompt_length: Int[Array, " b"],
    ) -> Float[Array, "b h*a c"]:
        """The h*a states that the head reads, from the empty token's position on."""
        start = num_prefix + prompt_length - 1
        place = start[:, None] + jnp.arange(self.config.num_action_tokens)[None]
        return jnp.take_along_axis(states, place[:, :, None], axis=1)
