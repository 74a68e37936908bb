"""Typical porting mistakes in pi0 and pi0.5, made on purpose: each must break parity.

The record holds how far each mistake moved openpi's own code; ours must move as far, so that a
mutation here is the mistake that it is named after. What comes before a mistake is not computed
again.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.openpi.network import Pi0Inputs, gemma, pi0, siglip
from qvla_jax.families.openpi.processor import Processor
from qvla_jax.models.surgery import named_modules

from .openpi import PROGRAMS, OpenpiReference, Run, integrate
from .reference import install
from .trim_openpi import NAMES


@dataclasses.dataclass
class Case:
    """What a mutation may change: a private copy of the model, its inputs, the code."""

    reference: OpenpiReference
    unchanged: Run
    model: pi0.FlowMatching
    inputs: Pi0Inputs
    patch: pytest.MonkeyPatch
    processor: Processor
    # Of both observations, in the robot's units.
    states: np.ndarray
    steps_left_out: int = 0

    def wrap(self, owner: object, name: str, change: Callable[..., object]) -> None:
        """Replaces `owner.name` by `change`, which takes the original first."""
        original = getattr(owner, name)
        self.patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    def keep_images(self) -> None:
        """The tower's tokens, which the mistake does not reach, are not computed again."""
        tokens = self.unchanged.found["prefix_tokens"]
        cameras = self.inputs.images.shape[1]
        patches = self.model.config.vision.num_patches
        images = tokens[:, : cameras * patches].reshape(-1, patches, tokens.shape[-1])
        self.patch.setattr(siglip.Siglip, "__call__", lambda self, pixels: jnp.asarray(images))


class _Jax:
    """Stands for `jax` in a module, with the erf GELU."""

    class nn:  # noqa: N801
        @staticmethod
        def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
            assert approximate
            return jax.nn.gelu(x, approximate=False)

    def __getattr__(self, name: str) -> object:
        return getattr(jax, name)


# Images: the tower runs again.


def erf_in_tower(case: Case) -> None:
    case.patch.setattr(siglip, "jax", _Jax())


def layer_norm_epsilon(case: Case) -> None:
    for norm in named_modules(case.model, nnx.LayerNorm).values():
        assert norm.epsilon == 1e-6
        norm.epsilon = 1e-5


def no_encoder_norm(case: Case) -> None:
    case.wrap(
        siglip.LayerNorm,
        "__call__",
        lambda original, self, x: (
            x if self is case.model.PaliGemma.img.Transformer.encoder_norm else original(self, x)
        ),
    )


def images_divided(case: Case) -> None:
    width = case.model.config.language.width
    case.keep_images()
    case.wrap(siglip.Siglip, "__call__", lambda original, *args: original(*args) / width**0.5)


# Prefix: the language model runs again.


def tokens_not_scaled(case: Case) -> None:
    case.keep_images()
    case.patch.setattr(gemma.Gemma, "embed", lambda self, tokens: self.embedder(tokens))


def erf_in_gemma(case: Case) -> None:
    case.keep_images()
    case.patch.setattr(gemma, "jax", _Jax())


def gate_and_up_swapped(case: Case) -> None:
    case.keep_images()
    for mlp in named_modules(case.model, gemma.FeedForward).values():
        mlp.gate, mlp.up = mlp.up, mlp.gate


def scale_without_one(case: Case) -> None:
    case.keep_images()
    for norm in named_modules(case.model, gemma.RMSNorm).values():
        norm.scale[...] = norm.scale[...] - 1.0


def rms_norm_epsilon(case: Case) -> None:
    case.keep_images()
    norms = named_modules(case.model, gemma.RMSNorm) | named_modules(case.model, gemma.AdaRMSNorm)
    for norm in norms.values():
        assert norm.epsilon == 1e-6
        norm.epsilon = 1e-5


def keys_and_values_swapped(case: Case) -> None:
    case.keep_images()
    for attention in named_modules(case.model, gemma.Attention).values():
        for suffix in ("", "_1"):
            k, v = (getattr(attention, f"{name}_einsum{suffix}") for name in "kv")
            setattr(attention, f"k_einsum{suffix}", v)
            setattr(attention, f"v_einsum{suffix}", k)


def interleaved_rope(case: Case) -> None:
    def interleaved(x: jax.Array, angles: gemma.Angles) -> jax.Array:
        cos, sin = angles
        first, second = x[..., ::2], x[..., 1::2]
        pairs = [first * cos - second * sin, second * cos + first * sin]
        return jnp.stack(pairs, axis=-1).reshape(x.shape)

    case.keep_images()
    case.patch.setattr(gemma, "apply_rotary", interleaved)


def positions_count_padding(case: Case) -> None:
    case.keep_images()

    def fill(original, self, x, positions, mask):
        return original(
            self, x, jnp.broadcast_to(jnp.arange(x.shape[1])[None], positions.shape), mask
        )

    case.wrap(gemma.Gemma, "fill", fill)
    suffix_behind_padding(case)


def absent_cameras_seen(case: Case) -> None:
    case.keep_images()
    case.inputs = dataclasses.replace(case.inputs, image_mask=np.ones_like(case.inputs.image_mask))


def padding_seen(case: Case) -> None:
    case.keep_images()
    case.inputs = dataclasses.replace(case.inputs, token_mask=np.ones_like(case.inputs.token_mask))


# Suffix: the first step runs again.


def suffix_behind_padding(case: Case) -> None:
    def step(original, self, x, positions, prefix, valid, mask, modulations):
        start = valid.shape[-1]
        positions = positions - positions[:, :1] + start
        return original(self, x, positions, prefix, valid, mask, modulations)

    case.wrap(gemma.Gemma, "step", step)


def causal_actions(case: Case) -> None:
    case.patch.setattr(
        type(case.model),
        "suffix_mask",
        lambda self, length: jnp.tril(jnp.ones((length, length), bool))[None, None],
    )


def state_sees_actions(case: Case) -> None:
    case.patch.setattr(type(case.model), "suffix_mask", lambda self, length: None)


def time_reversed(case: Case) -> None:
    case.wrap(pi0, "time_embedding", lambda original, t, width: original(1.0 - t, width))


def other_periods(case: Case) -> None:
    case.patch.setattr(pi0, "_PERIODS", (1.0, 10000.0))


def without_two_pi(case: Case) -> None:
    case.wrap(
        pi0, "time_embedding", lambda original, t, width: original(t / np.float32(2 * np.pi), width)
    )


def cosines_first(case: Case) -> None:
    case.wrap(
        pi0,
        "time_embedding",
        lambda original, *args: jnp.roll(x := original(*args), x.shape[-1] // 2, axis=-1),
    )


def time_first(case: Case) -> None:
    kernel = case.model.action_time_mlp_in.kernel
    kernel[...] = jnp.roll(kernel[...], case.model.config.action_expert.width, axis=0)


def no_swish_in_action_time_mlp(case: Case) -> None:
    class NoSwish:
        """Stands for `jax`."""

        class nn:  # noqa: N801
            swish = staticmethod(lambda x: x)

        def __getattr__(self, name: str) -> object:
            return getattr(jax, name)

    case.patch.setattr(pi0, "jax", NoSwish())


def no_gate(case: Case) -> None:
    case.patch.setattr(gemma, "_residual", lambda x, y, gate: x + y)


def shift_before_scale(case: Case) -> None:
    def call(original, self, x, modulation):
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        return original(self, x, jnp.concatenate([scale, shift, gate], axis=-1))

    case.wrap(gemma.AdaRMSNorm, "__call__", call)


def adaptive_scale_without_one(case: Case) -> None:
    def call(original, self, x, modulation):
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        return original(self, x, jnp.concatenate([scale - 1.0, shift, gate], axis=-1))

    case.wrap(gemma.AdaRMSNorm, "__call__", call)


def no_swish_behind_time_mlp(case: Case) -> None:
    def condition(self: pi0.Pi05, times: jax.Array) -> jax.Array:
        x = pi0.time_embedding(times, self.config.action_expert.width)
        return self.time_mlp_out(jax.nn.swish(self.time_mlp_in(x)))

    case.patch.setattr(pi0.Pi05, "condition", condition)


# Chunk: what is made of the actions.


def last_step_dropped(case: Case) -> None:
    case.steps_left_out = 1


def other_statistics(case: Case) -> None:
    other = {"zscore": "quantile", "quantile": "zscore"}[case.processor.config.normalization]
    right, case.processor = case.processor, case.reference.processor(normalization=other)
    # openpi un-normalizes the state, too, before it is added.
    case.states = case.processor.state.unnormalize(right.state.normalize(case.states))


def relative_actions_flipped(case: Case) -> None:
    delta = case.processor.config.delta_actions
    case.processor = case.reference.processor(delta_actions=not delta)


IMAGES = {
    "image tokens divided by sqrt(width) (stock Hugging Face PaliGemma)": images_divided,
    "SigLIP MLP with exact (erf) GELU": erf_in_tower,
    "SigLIP LayerNorm eps 1e-5 for 1e-6": layer_norm_epsilon,
    "SigLIP final LayerNorm (encoder_norm) skipped": no_encoder_norm,
}
PREFIX = {
    "token embedding not multiplied by sqrt(width)": tokens_not_scaled,
    "Gemma MLP with exact (erf) GELU": erf_in_gemma,
    "Gemma MLP gate and up swapped": gate_and_up_swapped,
    "RMSNorm scale not offset by 1": scale_without_one,
    "RMSNorm eps 1e-5 for 1e-6": rms_norm_epsilon,
    "k and v of kv_einsum swapped": keys_and_values_swapped,
    "rope on interleaved pairs": interleaved_rope,
    "positions count padding and absent cameras (arange)": positions_count_padding,
    "mask of an absent camera ignored": absent_cameras_seen,
    "prompt padding attended": padding_seen,
}
SUFFIX = {
    "only suffix positions start after the padded prefix length": suffix_behind_padding,
    "action tokens causal among themselves": causal_actions,
    "state token attends to action tokens": state_sees_actions,
    "timestep t replaced by 1 - t": time_reversed,
    "time embedding periods 1..10000 for 4e-3..4": other_periods,
    "time embedding without 2 pi": without_two_pi,
    "time embedding cos before sin": cosines_first,
    "concat [time, action] for [action, time]": time_first,
    "no swish between the action-time MLP layers": no_swish_in_action_time_mlp,
    "adaRMS gate missing (plain residual)": no_gate,
    "adaRMS chunks read as shift, scale, gate": shift_before_scale,
    "adaRMS scale not offset by 1": adaptive_scale_without_one,
    "no swish after time_mlp_out": no_swish_behind_time_mlp,
}
CHUNK = {
    "last Euler step dropped": last_step_dropped,
    "un-normalized with quantile for zscore": other_statistics,
    "un-normalized with zscore for quantile": other_statistics,
    "AbsoluteActions left out": relative_actions_flipped,
    "AbsoluteActions added (pi05_libero has none)": relative_actions_flipped,
}


def _prefix_stages(case: Case) -> tuple[pi0.Prefix, dict[str, np.ndarray]]:
    tokens, valid = case.model.embed_prefix(case.inputs)
    # Not computed again.
    case.patch.setattr(type(case.model), "embed_prefix", lambda self, inputs: (tokens, valid))
    prefix = case.model.prefix(case.inputs)
    patches = case.model.config.vision.num_patches
    images = case.inputs.images.shape[1] * patches
    found = {
        "prefix_tokens": np.asarray(tokens),
        # Of the first sample.
        "image_tokens": np.asarray(tokens)[0, :images].reshape(-1, patches, tokens.shape[-1]),
        "language_tokens": np.asarray(tokens)[:, images:],
    }
    for place, held in (("first", prefix.held[0]), ("last", prefix.held[-1])):
        found[f"kv_cache_{place}_k"] = np.asarray(held.k).transpose(0, 3, 1, 2)
        found[f"kv_cache_{place}_v"] = np.asarray(held.v).swapaxes(1, 2)
    return prefix, found


def _suffix_stages(case: Case, prefix: pi0.Prefix) -> dict[str, np.ndarray]:
    model = case.model
    conditioning = model.conditioning(model.times[None])
    noise = jnp.asarray(case.inputs.noise)
    found = {
        "suffix_tokens": np.asarray(model.embed_suffix(noise, prefix, conditioning.at(0))),
        "v_t_first_step": np.asarray(model.velocity(noise, prefix, conditioning.at(0))),
    }
    if model.config.variant == "pi05":
        found["adarms_cond_steps"] = np.asarray(model.condition(model.times[None]))[0]
    return found


def _chunk_stages(case: Case) -> dict[str, np.ndarray]:
    run, config = case.unchanged, case.model.config
    if case.steps_left_out:
        found = integrate(case.model, case.inputs.noise, run.prefix, run.conditioning)
        return {"actions": found["x_t"][config.num_steps - case.steps_left_out]}
    arrays = case.reference.arrays
    chunks = np.stack([arrays["policy_model_actions0"], arrays["policy_model_actions1"]])
    return {"env_actions": case.processor.unnormalize_actions(chunks, case.states)}


def _unchanged(case: Case) -> dict[str, np.ndarray]:
    """Our own stages, whole, to tell how far a mistake moves them; compared with the record."""
    arrays = case.reference.arrays
    return case.unchanged.found | {
        "actions": arrays["actions"],
        "env_actions": np.stack([arrays["policy_env_actions0"], arrays["policy_env_actions1"]]),
    }


# Those of pi0 that pi0.5's record has as well, or that its own has in their place.
_BOTH = (
    "image tokens divided by sqrt(width) (stock Hugging Face PaliGemma)",
    "Gemma MLP with exact (erf) GELU",
    "RMSNorm eps 1e-5 for 1e-6",
    "positions count padding and absent cameras (arange)",
    "mask of an absent camera ignored",
    "only suffix positions start after the padded prefix length",
    "action tokens causal among themselves",
    "timestep t replaced by 1 - t",
    "time embedding periods 1..10000 for 4e-3..4",
    "time embedding without 2 pi",
    "last Euler step dropped",
)
_PI05 = (
    "adaRMS gate missing (plain residual)",
    "adaRMS chunks read as shift, scale, gate",
    "adaRMS scale not offset by 1",
    "no swish after time_mlp_out",
    "un-normalized with zscore for quantile",
    "AbsoluteActions added (pi05_libero has none)",
)
MUTATIONS = {
    "pi0_tiny": [m for m in (*IMAGES, *PREFIX, *SUFFIX, *CHUNK) if m not in _PI05],
    "pi05_tiny": [*_BOTH, *_PI05],
}
CASES = [(name, mutation) for name in NAMES for mutation in MUTATIONS[name]]


def _as_recorded(
    found: dict[str, np.ndarray], whole: dict[str, np.ndarray], moved: dict[str, float]
) -> dict[str, float]:
    """How far the stages moved that the record of the mutations measures otherwise."""
    amounts = {"kv_cache_last": max(moved.get(f"kv_cache_last_{part}", 0.0) for part in "kv")}
    if "image_tokens" in moved:  # of both samples
        amounts["image_tokens"] = moved["prefix_tokens"]
        if moved["language_tokens"]:
            amounts["image_tokens"] = moved["image_tokens"]
    for stage, name in (("adarms_cond_steps", "adarms_cond"), ("env_actions", "env_actions")):
        if stage in found:  # of the first step, and of the first observation
            amounts[name] = float(np.abs(found[stage][0] - whole[stage][0]).max())
    return amounts


@pytest.mark.parametrize("name", NAMES)
def test_all_recorded_mutations_are_made(openpi_references, name):
    recorded = {m for m in openpi_references(name).mutations if not m.startswith("_")}
    assert recorded == set(MUTATIONS[name])


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_a_porting_mistake_breaks_parity_as_far_as_in_openpi(
    openpi_runs, monkeypatch, name, mutation
):
    reference, run = openpi_runs(name)
    case = Case(
        reference,
        run,
        nnx.clone(reference.policy.model),
        reference.inputs,
        monkeypatch,
        reference.policy.processor,
        np.stack([reference.arrays[f"policy_obs{i}_state"] for i in range(2)]),
    )
    install(PROGRAMS, monkeypatch)
    for group in (IMAGES, PREFIX, SUFFIX, CHUNK):
        if mutation in group:
            group[mutation](case)
    with jax.default_matmul_precision("float32"):
        if mutation in CHUNK:
            found = _chunk_stages(case)
        else:
            prefix, found = run.prefix, {}
            if mutation not in SUFFIX:
                prefix, found = _prefix_stages(case)
            found |= _suffix_stages(case, prefix)
    monkeypatch.undo()
    whole = _unchanged(case)
    valid = run.found["prefix_mask"]
    moved, broken = {}, set()
    for stage, value in found.items():
        before = whole[stage]
        if stage.startswith("kv_cache"):
            value, before = value[valid], before[valid]
        moved[stage] = float(np.abs(value - before).max())
        if stage in reference.arrays or stage == "v_t_first_step":
            deviation = (
                float(np.abs(value - reference.arrays["v_t"][0]).max())
                if stage == "v_t_first_step"
                else reference.deviation(stage, found[stage])
            )
            tolerance = reference.tolerance("v_t" if stage == "v_t_first_step" else stage)
            broken |= {stage} if deviation > tolerance else set()
        elif moved[stage] > 1e-6:  # actions in the robot's units
            broken.add(stage)
    assert broken, f"{mutation} passes for parity: {moved}"
    moved |= _as_recorded(found, whole, moved)
    for stage, recorded in reference.mutations[mutation].items():
        if stage not in moved:
            continue
        noise = 4 * reference.noise.get({"v_t_first_step": "v_t"}.get(stage, stage), 2e-5)
        assert abs(moved[stage] - recorded) <= 0.02 * recorded + noise, (stage, moved, recorded)
