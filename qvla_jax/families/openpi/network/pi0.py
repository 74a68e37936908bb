"""pi0 and pi0.5: a prefix of images and prompt, and Euler steps from noise to actions.

t = 1 is noise and t = 0 the actions. The prefix runs once and leaves its keys and values; the
action expert runs once for each step. What time alone decides (pi0's time embedding, pi0.5's
modulations) is the same for every observation and is computed for all steps at once.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import AnyArray, Array, Bool, Float, Float32, Int, UInt8
from qvla_jax.families.family import Network
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network.gemma import Gemma, KeysValues, Modulations
from qvla_jax.families.openpi.network.siglip import Siglip
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.models.abstract import abstract
from qvla_jax.models.linear import Linear
from qvla_jax.models.loops import repeat

# Shortest and longest period of the time embedding; t runs from 0 to 1.
_PERIODS: Final = (4e-3, 4.0)
# Times at which a chunk is met in one training step.
_DRAWS: Final = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pi0Inputs:
    """What the network takes; the first axis of every array is the batch.

    Arrays may be numpy's until they are put on a device.
    """

    # Images of v cameras at the tower's size. openpi always has three; one that is missing in all
    # observations may as well be left out: nothing attends to it and it takes no position.
    images: UInt8[Array, "b v H W 3"]
    # Cameras that are there; the others' images are read by nothing.
    image_mask: Bool[Array, "b v"]
    # The prompt, padded on the right, and which of its tokens are not padding.
    tokens: Int[Array, "b t"]
    token_mask: Bool[Array, "b t"]
    # What the Euler steps begin with.
    noise: Float[Array, "b h a"]
    # Normalized and padded; None for pi0.5, which reads the state from the prompt, if at all.
    state: Float[Array, "b a"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What all steps of one call read."""

    # Of images and prompt, in every layer.
    held: list[KeysValues]
    # Places that are neither padding nor of a missing camera.
    valid: Bool[Array, "b s"]
    # pi0's first suffix token.
    state: Float[Array, "b 1 c"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What time alone decides, for n steps (or for each sample of a batch, with n = 1)."""

    # pi0's time embedding.
    embedding: Float[Array, "#b n c"] | None
    # pi0.5's adaptive norms.
    modulations: Modulations | None

    def at(self, step: int | Int[Array, ""]) -> "Conditioning":
        """Of one step."""
        return jax.tree.map(
            lambda x: (
                jax.lax.dynamic_slice_in_dim(x, step, 1, axis=1)
                if isinstance(step, jax.Array)
                else x[:, step : step + 1]
            ),
            self,
        )


class PaliGemma(nnx.Module):
    """The vision tower, and the language model with the action expert."""

    def __init__(self, config: OpenpiConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.img = Siglip(config.vision, config.language.width, dtype=dtype, rngs=rngs)
        self.llm = Gemma(
            (config.language, config.action_expert),
            config.vocab_size,
            adaptive=config.variant == "pi05",
            dtype=dtype,
            rngs=rngs,
        )


class FlowMatching(Network):
    """What pi0 and pi0.5 share."""

    def __init__(self, config: OpenpiConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.action_expert.width
        self.PaliGemma = PaliGemma(config, dtype=jnp.dtype(config.dtype), rngs=rngs)
        # Noise, actions and time are float32 whatever the dtype of the rest.
        self.action_in_proj = _linear(config.action_dim, width, rngs)
        self.action_out_proj = _linear(width, config.action_dim, rngs)

    def __call__(self, inputs: Pi0Inputs) -> Float[Array, "b h a"]:
        """Normalized action chunk of each observation; differentiable through all steps."""
        # Conditioning of each observation, so that passes with hooks tell frames apart in it, too.
        times = jnp.broadcast_to(self.times, (len(inputs.noise), self.config.num_steps))
        return self._integrated(inputs, self.conditioning(times))

    def actions(
        self, inputs: Pi0Inputs, conditioning: Conditioning | None = None
    ) -> Float[Array, "b h a"]:
        """The normalized chunk that the robot executes.

        Args:
            inputs: observations and noise.
            conditioning: of all steps, from `self.conditioning(self.times[None])`, which is the
                same for every call; None computes it.
        """
        return self._integrated(inputs, conditioning or self.conditioning(self.times[None]))

    def _integrated(self, inputs: Pi0Inputs, conditioning: Conditioning) -> Float[Array, "b h a"]:
        prefix = self.prefix(inputs)

        def step(x: Float[Array, "b h a"], number: int | Int[Array, ""]) -> Float[Array, "b h a"]:
            return self.step(x, prefix, conditioning.at(number))

        return repeat(step, jnp.asarray(inputs.noise), self.config.num_steps)

    @property
    def times(self) -> Float32[np.ndarray, " n"]:
        """Time of each step, summed up in float32 as openpi's loop does."""
        steps = self.config.num_steps
        increments = np.full(steps, -1.0 / steps, np.float32)
        increments[0] = 1.0
        return np.cumsum(increments, dtype=np.float32)

    def loss(
        self, inputs: Pi0Inputs, chunks: Float[Array, "b h a"], key: jax.Array
    ) -> Float[Array, ""]:
        """Flow matching: `matching_error` at times of Beta(1.5, 1), as openpi draws them.

        Each chunk is met at several times, one from each of as many equally likely spans: they
        share the prefix, which is most of the work.

        Args:
            inputs: observations; their noise is not read.
            chunks: demonstrated actions, normalized and padded.
            key: of times and noise.
        """
        noise_key, time_key = jax.random.split(key)
        size = (len(chunks), _DRAWS)
        noise = jax.random.normal(noise_key, (*size, *chunks.shape[1:]))
        spans = jnp.arange(_DRAWS, dtype=jnp.float32)[None]
        quantiles = (spans + jax.random.uniform(time_key, size)) / _DRAWS
        times = quantiles ** (1 / 1.5)  # whose distribution function is t^1.5
        return self.matching_error(inputs, chunks, noise, 0.999 * times + 0.001)

    def matching_error(
        self,
        inputs: Pi0Inputs,
        chunks: Float[Array, "b h a"],
        noise: Float[Array, "b n h a"],
        times: Float[Array, "b n"],
    ) -> Float[Array, ""]:
        """Mean squared error of the velocity from actions to noise, of the robot's entries.

        Args:
            inputs: observations; their noise is not read.
            chunks: demonstrated actions, normalized and padded.
            noise: n draws for each chunk.
            times: of each draw; the network sees t noise + (1 - t) actions.
        """
        draws = noise.shape[1]
        prefix = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), self.prefix(inputs))
        conditioning = self.conditioning(times.reshape(-1, 1))
        t, actions = times[:, :, None, None], chunks[:, None]
        noisy = t * noise + (1 - t) * actions
        velocity = self.velocity(noisy.reshape(-1, *chunks.shape[1:]), prefix, conditioning)
        error = velocity.reshape(noisy.shape) - (noise - actions)
        robot = self.config.robot
        entries = self.config.action_dim if robot is None else ROBOTS[robot].action_dim
        return jnp.mean(jnp.square(error[..., :entries]))

    def step(
        self, x: Float[Array, "b h a"], prefix: Prefix, conditioning: Conditioning
    ) -> Float[Array, "b h a"]:
        """One Euler step towards the actions, under the conditioning of its time."""
        change = -1.0 / self.config.num_steps * self.velocity(x, prefix, conditioning)
        return x + change.astype(x.dtype)

    def prefix(self, inputs: Pi0Inputs) -> Prefix:
        """Keys and values of images and prompt, and what else no step changes."""
        tokens, valid = self.embed_prefix(inputs)
        positions = jnp.cumsum(valid, axis=1) - 1
        held = self.PaliGemma.llm.fill(tokens, positions, valid[:, None, None])
        return Prefix(held=held, valid=valid, state=self.state_token(inputs))

    def embed_prefix(self, inputs: Pi0Inputs) -> tuple[Float[Array, "b s c"], Bool[Array, "b s"]]:
        """Tokens of all cameras and of the prompt, and which are valid."""
        b, v = inputs.images.shape[:2]
        pixels = inputs.images.reshape(-1, *inputs.images.shape[2:]).astype(jnp.float32)
        patches = self.PaliGemma.img(pixels / 255.0 * 2.0 - 1.0)
        patches = patches.reshape(b, -1, patches.shape[-1])
        words = self.PaliGemma.llm.embed(inputs.tokens)
        seen = jnp.repeat(inputs.image_mask, patches.shape[1] // v, axis=1)
        valid = jnp.concatenate([seen, inputs.token_mask], axis=1)
        return jnp.concatenate([patches, words.astype(patches.dtype)], axis=1), valid

    def velocity(
        self, x: Float[Array, "b h a"], prefix: Prefix, conditioning: Conditioning
    ) -> Float[Array, "b h a"]:
        """Derivative of noisy actions x by time, at the time of the conditioning."""
        tokens = self.embed_suffix(x, prefix, conditioning)
        length = tokens.shape[1]
        start = jnp.sum(prefix.valid, axis=1)[:, None]
        states = self.PaliGemma.llm.step(
            tokens,
            start + jnp.arange(length)[None],
            prefix.held,
            prefix.valid[:, None, None],
            self.suffix_mask(length),
            conditioning.modulations,
        )
        return self.action_out_proj(states[:, -self.config.action_horizon :])

    def state_token(self, inputs: Pi0Inputs) -> Float[Array, "b 1 c"] | None:
        """The suffix's first token, of variants that have one."""
        raise NotImplementedError

    def embed_suffix(
        self, x: Float[Array, "b h a"], prefix: Prefix, conditioning: Conditioning
    ) -> Float[Array, "b t c"]:
        """Suffix tokens of noisy actions."""
        raise NotImplementedError

    def suffix_mask(self, length: int) -> Bool[Array, "1 1 t t"] | None:
        """Which suffix token attends to which; None: all to all."""
        raise NotImplementedError

    def conditioning(self, times: Float[AnyArray, "#b n"]) -> Conditioning:
        """What the network makes of times alone."""
        raise NotImplementedError

    def keep_conditioning(self) -> None:
        """Keeps the conditioning of all steps in place of the weights that make it."""


class Pi0(FlowMatching):
    """pi0: a state token, and time mixed into the action tokens."""

    def __init__(self, config: OpenpiConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.action_expert.width
        self.state_proj = _linear(config.action_dim, width, rngs)
        self.action_time_mlp_in = _linear(2 * width, width, rngs)
        self.action_time_mlp_out = _linear(width, width, rngs)

    def state_token(self, inputs: Pi0Inputs) -> Float[Array, "b 1 c"]:
        if inputs.state is None:
            raise ValueError(f"{self.config.name} takes a state, but the inputs hold none")
        return self.state_proj(inputs.state[:, None])

    def embed_suffix(
        self, x: Float[Array, "b h a"], prefix: Prefix, conditioning: Conditioning
    ) -> Float[Array, "b t c"]:
        actions = self.action_in_proj(x)
        assert conditioning.embedding is not None  # pi0's own
        assert prefix.state is not None
        time = jnp.broadcast_to(conditioning.embedding, actions.shape)
        mixed = self.action_time_mlp_in(jnp.concatenate([actions, time], axis=-1))
        mixed = self.action_time_mlp_out(jax.nn.swish(mixed))
        return jnp.concatenate([prefix.state, mixed], axis=1)

    def suffix_mask(self, length: int) -> Bool[Array, "1 1 t t"]:
        # The state sees itself, actions see everything.
        place = jnp.arange(length)
        return ((place[:, None] > 0) | (place[None] == 0))[None, None]

    def conditioning(self, times: Float[AnyArray, "#b n"]) -> Conditioning:
        embedding = time_embedding(times, self.config.action_expert.width)
        return Conditioning(embedding=embedding, modulations=None)


class Pi05(FlowMatching):
    """pi0.5: time modulates the norms of the action expert."""

    def __init__(self, config: OpenpiConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.action_expert.width
        self.time_mlp_in = _linear(width, width, rngs)
        self.time_mlp_out = _linear(width, width, rngs)
        # [norms, n, 3 c], where those of all steps are kept.
        self.modulations: nnx.Param[Any] | None = nnx.data(None)

    def state_token(self, inputs: Pi0Inputs) -> None:
        return None

    def embed_suffix(
        self, x: Float[Array, "b h a"], prefix: Prefix, conditioning: Conditioning
    ) -> Float[Array, "b t c"]:
        return self.action_in_proj(x)

    def suffix_mask(self, length: int) -> None:
        return None

    def conditioning(self, times: Float[AnyArray, "#b n"]) -> Conditioning:
        llm = self.PaliGemma.llm
        if self.modulations is not None:  # of its own times; there are no others then
            kept = Modulations.of_norms(self.modulations[...][:, None])
            return Conditioning(embedding=None, modulations=kept)
        return Conditioning(embedding=None, modulations=llm.modulations(self.condition(times)))

    def keep_conditioning(self) -> None:
        llm: Any = self.PaliGemma.llm
        if isinstance(self.time_mlp_in.kernel.get_value(), jax.ShapeDtypeStruct):
            norms = 2 * self.config.language.depth + 1
            shape = (norms, self.config.num_steps, 3 * self.config.action_expert.width)
            kept = jax.ShapeDtypeStruct(shape, jnp.dtype(self.config.dtype))
        else:
            modulations = self.conditioning(self.times[None]).modulations
            kept = jnp.concatenate(jax.tree.leaves(modulations))
        self.modulations = nnx.Param(kept)
        mine: Any = self
        mine.time_mlp_in = mine.time_mlp_out = None
        for layer in llm.layers:
            layer.pre_attention_norm_1.Dense_0 = layer.pre_ffw_norm_1.Dense_0 = None
        llm.final_norm_1.Dense_0 = None

    def condition(self, times: Float[AnyArray, "#b n"]) -> Float[Array, "#b n c"]:
        """The vectors that all adaptive norms take."""
        x = time_embedding(times, self.config.action_expert.width)
        return jax.nn.swish(self.time_mlp_out(jax.nn.swish(self.time_mlp_in(x))))


def time_embedding(times: Float[AnyArray, "#b n"], width: int) -> Float[Array, "#b n c"]:
    """Sines, then cosines of t with periods from 0.004 to 4, in geometric progression.

    Angles reach 1,570 rad, where float32 is off by 2e-4: the order of operations is openpi's.
    """
    shortest, longest = _PERIODS
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = shortest * (longest / shortest) ** fraction
    angles = jnp.asarray(times)[:, :, None] * (1.0 / period * 2 * jnp.pi)[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _linear(fan_in: int, out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(fan_in, out, dtype=jnp.float32, rngs=rngs)


_VARIANTS: Final = {"pi0": Pi0, "pi05": Pi05}


def make_model(config: OpenpiConfig, *, rngs: nnx.Rngs) -> FlowMatching:
    """The network that a configuration describes, with random weights."""
    return _VARIANTS[config.variant](config, rngs=rngs)


def abstract_model(config: OpenpiConfig, *, dtype: Any = None) -> FlowMatching:
    """The network with shapes and dtypes in place of arrays: costs no memory, cannot run.

    Args:
        config: the architecture.
        dtype: of all parameters; float32 if left out. The arithmetic's is in the configuration.
    """
    return abstract(make_model, config, dtype=dtype)


def unread_modules(config: OpenpiConfig) -> tuple[str, ...]:
    """Paths of what a checkpoint holds and no call reads: of the prefix, all behind its last keys.

    Of pi0.5, `time_mlp_in`, `time_mlp_out` and every `Dense_0` of the action expert's norms are
    read by `conditioning` alone, which serves every call.
    """
    last = f"PaliGemma.llm.layers.{config.language.depth - 1}"
    unread = ("attn.q_einsum", "attn.attn_vec_einsum", "pre_ffw_norm", "mlp")
    return (*(f"{last}.{module}" for module in unread), "PaliGemma.llm.final_norm")
