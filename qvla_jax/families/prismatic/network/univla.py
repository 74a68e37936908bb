"""UniVLA (arXiv 2505.06111): latent action tokens, and a decoder that reads their states.

The states are those that the public evaluation takes from `generate`, which returns one per
position that was fed; the last latent token is never fed. The "last four" are thus those of the
prompt's last token and of the first three latent tokens. Its "first 256" count from BOS on, which
leaves out the last patch. (Its training reads the states of the four latent tokens themselves.)
"""

import jax.numpy as jnp
from flax import nnx

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.network.action_decoder import ActionDecoder
from qvla_jax.families.prismatic.network.openvla import Autoregressive, ModelInputs


class UniVLA(Autoregressive):
    """UniVLA: greedy decoding of four latent action tokens, then the action decoder."""

    def __init__(self, config: OpenVLAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        assert config.latent_action is not None  # the configuration checks it
        self.action_decoder = ActionDecoder(
            config.text.hidden_size,
            config.action_horizon,
            config.action_dim,
            config.latent_action,
            rngs=rngs,
        )

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b h a"]:
        """Normalized action chunk from the greedily decoded latent tokens, which are held fixed."""
        states, latent_states = self.states(inputs)
        return self.action_decoder(latent_states, self.visual_states(states))

    def actions(self, inputs: ModelInputs, conditioning: None = None) -> Float[Array, "b h a"]:
        """Like a call, but uses the states of decoding itself if the tokens are not given."""
        if inputs.action_tokens is not None:
            return self(inputs)
        decoded = self.roll_out(inputs)
        return self.action_decoder(decoded.states, self.visual_states(decoded.prompt_states))

    def visual_states(self, states: Float[Array, "b t c"]) -> Float[Array, "b p c"]:
        """As many states as there are patches, from BOS on."""
        return states[:, : self.config.num_prefix_tokens]

    def choose(self, logits: Float[Array, "b v"]) -> Int[Array, " b"]:
        """The most likely token except the end of the sequence, which may not come so early."""
        stop = jnp.arange(logits.shape[-1]) == self.config.stop_token_id
        return jnp.argmax(jnp.where(stop[None], -jnp.inf, logits), axis=-1)
