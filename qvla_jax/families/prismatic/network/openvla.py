"""OpenVLA (action tokens) and OpenVLA-OFT (parallel decoding), and what UniVLA shares with them.

All put the patches right after BOS: BOS, patches of every image, the proprio token (OFT), the rest
of the prompt with the empty token last. OpenVLA then decodes 7 action tokens greedily and causally.
OpenVLA-OFT appends h a zeroed action placeholders and the stop token, lets every position attend to
every position that is not padding, and reads h a final-norm states from the empty token's own
position on: as in next-token prediction, a state is one position before the entry that it predicts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Bool, Float, Int, UInt8
from qvla_jax.families.family import Network
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network import action_bins
from qvla_jax.families.prismatic.network.action_head import L1RegressionActionHead
from qvla_jax.families.prismatic.network.llama import (
    LlamaForCausalLM,
    bidirectional_mask,
    causal_mask,
)
from qvla_jax.families.prismatic.network.projector import PrismaticProjector, ProprioProjector
from qvla_jax.families.prismatic.network.vision import VisionBackbone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the model takes; the first axis of every array is the batch.

    Arrays may be numpy arrays until they are put on a device.
    """

    # Images of v cameras, already at the towers' size.
    images: UInt8[Array, "b v H W 3"]
    # The prompt from BOS to the empty token, padded on the right.
    input_ids: Int[Array, "b t"]
    # Tokens of each prompt that are not padding.
    prompt_length: Int[Array, " b"]
    # Normalized proprio; None for policies that take none.
    proprio: Float[Array, "b p"] | None = None
    # The decoded tokens whose expectations or states are read, from `Prismatic.complete`; None
    # until then and for policies that decode none.
    action_tokens: Int[Array, "b n"] | None = None


class Prismatic(Network):
    """What all policies share: towers, projector and language model."""

    def __init__(self, config: OpenVLAConfig, *, rngs: nnx.Rngs):
        self.config = config
        llm_dim = config.text.hidden_size
        vision_dim = sum(tower.embed_dim for tower in config.vision)
        self.vision_backbone = VisionBackbone(
            config.vision, language_dim=llm_dim if config.use_film else None, rngs=rngs
        )
        self.projector = PrismaticProjector(vision_dim, llm_dim, rngs=rngs)
        self.language_model = LlamaForCausalLM(config.text, rngs=rngs)


class OpenVLAOFT(Prismatic):
    """OpenVLA-OFT: one bidirectional pass and a regression head."""

    def __init__(self, config: OpenVLAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        llm_dim = config.text.hidden_size
        self.proprio_projector = (
            ProprioProjector(config.proprio_dim, llm_dim, rngs=rngs) if config.proprio_dim else None
        )
        self.action_head = L1RegressionActionHead(
            llm_dim, config.action_horizon, config.action_dim, rngs=rngs
        )

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b h a"]:
        """Normalized action chunk of each observation."""
        embeddings, valid = self.embed(inputs)
        states = self.language_model.model(embeddings, bidirectional_mask(valid))
        return self.action_head(self.action_states(states, inputs.prompt_length))

    def embed(self, inputs: ModelInputs) -> tuple[Float[Array, "b t c"], Bool[Array, "b t"]]:
        """The whole sequence, and which positions are not padding."""
        text, valid, is_placeholder = self._text_embeddings(inputs)
        language = None
        if self.config.use_film:
            # The mean covers the prompt and the stop token, as in the reference.
            used = (valid & ~is_placeholder)[:, :, None]
            language = jnp.sum(text, axis=1, where=used) / jnp.sum(used, axis=1).astype(text.dtype)
        prefix = self.projector(self.vision_backbone(inputs.images, language))
        if self.proprio_projector is not None:
            if inputs.proprio is None:
                raise ValueError(f"{self.config.name} takes proprio, but the inputs hold none")
            prefix = jnp.concatenate([prefix, self.proprio_projector(inputs.proprio)], axis=1)
        return _behind_bos(prefix, text, valid)

    def _text_embeddings(
        self, inputs: ModelInputs
    ) -> tuple[Float[Array, "b t c"], Bool[Array, "b t"], Bool[Array, "b t"]]:
        """Prompt, zeroed placeholders and stop token; which are not padding; the placeholders."""
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
        return (
            jnp.where(is_placeholder[:, :, None], zero, embeddings),
            place <= stop_at,
            is_placeholder,
        )

    def action_states(
        self, states: Float[Array, "b t c"], prompt_length: Int[Array, " b"]
    ) -> Float[Array, "b h*a c"]:
        """The h a states that the head reads, from the empty token's position on."""
        start = self.config.num_prefix_tokens + prompt_length - 1
        place = start[:, None] + jnp.arange(self.config.num_action_tokens)[None]
        return jnp.take_along_axis(states, place[:, :, None], axis=1)


class Autoregressive(Prismatic):
    """What policies that decode tokens share: greedy decoding, and the states of tokens."""

    def complete(self, inputs: ModelInputs) -> ModelInputs:
        """The inputs with the greedily decoded tokens, unless they have them already."""
        if inputs.action_tokens is not None:
            return inputs
        tokens = jax.lax.stop_gradient(self.decode(inputs))
        return dataclasses.replace(inputs, action_tokens=tokens)

    def embed(self, inputs: ModelInputs) -> tuple[Float[Array, "b t c"], Bool[Array, "b t"]]:
        """The prompt with its patches, and which positions are not padding."""
        prefix = self.projector(self.vision_backbone(inputs.images))
        text = self.language_model.model.embed_tokens(inputs.input_ids)
        place = jnp.arange(inputs.input_ids.shape[1])[None]
        return _behind_bos(prefix, text, place < inputs.prompt_length[:, None])

    def states(self, inputs: ModelInputs) -> tuple[Float[Array, "b t c"], Float[Array, "b n c"]]:
        """Final-norm states from one causal pass over the prompt and its n decoded tokens.

        The tokens are held fixed, so the result is differentiable. Inputs from `complete` include
        the tokens, and every layer is then called once.

        Returns:
            The states of all positions, and of those that predict the tokens: the prompt's last
            position, and all tokens but the last.
        """
        tokens = self.complete(inputs).action_tokens
        assert tokens is not None  # what `complete` completes
        embeddings, _ = self.embed(inputs)
        count = self.config.num_decoded_tokens
        places = self._first_place(inputs)[:, None] + jnp.arange(count)[None]
        rows = jnp.arange(len(places))[:, None]
        embeddings = jnp.pad(embeddings, ((0, 0), (0, count - 1), (0, 0)))
        chosen = self.language_model.model.embed_tokens(tokens[:, :-1])
        embeddings = embeddings.at[rows, places[:, 1:]].set(chosen)
        valid = jnp.arange(embeddings.shape[1])[None] <= places[:, -1:]
        states = self.language_model.model(embeddings, causal_mask(valid))
        return states, jnp.take_along_axis(states, places[:, :, None], axis=1)

    def decode(self, inputs: ModelInputs) -> Int[Array, "b n"]:
        """The most likely tokens, one after the other, with a KV cache."""
        return self.roll_out(inputs).tokens

    def roll_out(self, inputs: ModelInputs) -> "RollOut":
        """Decodes greedily; returns all that was computed on the way."""
        embeddings, valid = self.embed(inputs)
        first = self._first_place(inputs)
        steps = self.config.num_decoded_tokens
        prompt, caches = self.language_model.model.fill(embeddings, causal_mask(valid))
        states = [jnp.take_along_axis(prompt, first[:, None, None], axis=1)]
        logits = [self.language_model.lm_head(states[0])[:, 0]]
        tokens = [self.choose(logits[0])]
        for step in range(1, steps):
            embedding = self.language_model.model.embed_tokens(tokens[-1][:, None])
            state, caches = self.language_model.model.step(embedding, first + step, caches)
            states.append(state)
            logits.append(self.language_model.lm_head(state)[:, 0])
            tokens.append(self.choose(logits[-1]))
        return RollOut(
            tokens=jnp.stack(tokens, axis=1),
            logits=jnp.stack(logits, axis=1),
            prompt_states=prompt,
            states=jnp.concatenate(states, axis=1),
        )

    def choose(self, logits: Float[Array, "b v"]) -> Int[Array, " b"]:
        """The token to decode, given its logits."""
        return jnp.argmax(logits, axis=-1)

    def _first_place(self, inputs: ModelInputs) -> Int[Array, " b"]:
        """Position of the prompt's last token, whose state predicts the first token."""
        return self.config.num_prefix_tokens + inputs.prompt_length - 1


@dataclasses.dataclass(frozen=True)
class RollOut:
    """What greedy decoding computes."""

    tokens: Int[Array, "b n"]
    # The logits that each token was chosen by.
    logits: Float[Array, "b n v"]
    # Final-norm states of the prompt with its patches, and of the positions that predict tokens:
    # the prompt's last position, and all tokens but the last.
    prompt_states: Float[Array, "b t c"]
    states: Float[Array, "b n c"]


class OpenVLA(Autoregressive):
    """OpenVLA: greedy decoding of 7 action tokens."""

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b 1 a"]:
        """Expected action over the bins at each of the 7 greedily decoded positions."""
        logits = self.language_model.lm_head(self.states(inputs)[1])
        return action_bins.expectation(logits, self.config.action_vocab_size)[:, None]

    def actions(self, inputs: ModelInputs, conditioning: None = None) -> Float[Array, "b 1 a"]:
        """Normalized action of the greedily decoded tokens: what the robot executes."""
        return action_bins.decode(self.decode(inputs), self.config.action_vocab_size)[:, None]


def _behind_bos(
    prefix: Float[Array, "b p c"], text: Float[Array, "b t c"], valid: Bool[Array, "b t"]
) -> tuple[Float[Array, "b p+t c"], Bool[Array, "b p+t"]]:
    """Inserts the prefix after the first token."""
    return (
        jnp.concatenate([text[:, :1], prefix, text[:, 1:]], axis=1),
        jnp.concatenate([valid[:, :1], jnp.ones(prefix.shape[:2], bool), valid[:, 1:]], axis=1),
    )
