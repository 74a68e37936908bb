"""Typical porting mistakes, made on purpose: each must break parity.

The record holds how far each mistake moved the reference itself; ours must move as far, so that a
mutation here is the mistake that it is named after.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.prismatic.checkpoint import lora
from qvla_jax.families.prismatic.network import ModelInputs, openvla, projector, vision
from qvla_jax.models.surgery import named_modules

from .reference import Reference, stages
from .trim import PLACES_STEP

# Stages that are recorded whole, not thinned out: their largest deviation is known.
_WHOLE = (
    "fused_patch_features",
    "projector_output",
    "actions_hidden_states",
    "normalized_actions",
    "step0_logits",
)


@dataclasses.dataclass
class Case:
    """What a mutation may change: a private copy of the model, its inputs, the code."""

    reference: Reference
    model: nnx.Module
    inputs: ModelInputs
    patch: pytest.MonkeyPatch

    @property
    def towers(self) -> tuple[vision.VisionTransformer, vision.VisionTransformer]:
        backbone = self.model.vision_backbone
        return backbone.featurizer, backbone.fused_featurizer

    def change_towers(self, **fields: object) -> None:
        for tower in self.towers:
            tower.config = dataclasses.replace(tower.config, **fields)

    def change_config(self, **fields: object) -> None:
        self.model.config = dataclasses.replace(self.model.config, **fields)

    def reload(self) -> None:
        self.model = self.reference.load().model


def last_layer(case: Case) -> None:
    case.change_towers(feature_block=2)


class _TanhGelu:
    """Stands for `jax` in a module that uses nothing of it but the GELU."""

    class nn:  # noqa: N801
        @staticmethod
        def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
            assert not approximate
            return jax.nn.gelu(x, approximate=True)


def tanh_gelu_in_towers(case: Case) -> None:
    case.patch.setattr(vision, "jax", _TanhGelu)


def tanh_gelu_in_projector(case: Case) -> None:
    case.patch.setattr(projector, "jax", _TanhGelu)


def layer_norm_epsilon(case: Case) -> None:
    for norm in named_modules(case.model.vision_backbone, nnx.LayerNorm).values():
        assert norm.epsilon == 1e-6
        norm.epsilon = 1e-5


def rms_norm_epsilon(case: Case) -> None:
    for norm in named_modules(case.model.language_model, nnx.RMSNorm).values():
        assert norm.epsilon == 1e-6
        norm.epsilon = 1e-5


def no_layer_scale(case: Case) -> None:
    for scale in named_modules(case.model, vision.LayerScale).values():
        scale.scale_factor[...] = jnp.ones_like(scale.scale_factor[...])


def siglip_first(case: Case) -> None:
    """Each tower takes the pixels that were normalized for the other one."""
    first, second = case.towers
    colours = [{"mean": t.config.mean, "std": t.config.std} for t in (second, first)]
    for tower, swapped in zip((first, second), colours, strict=True):
        tower.config = dataclasses.replace(tower.config, **swapped)


def no_registers(case: Case) -> None:
    token = case.towers[0].reg_token
    token[...] = jnp.zeros_like(token[...])


def unrounded_colours(case: Case) -> None:
    tower = case.towers[0]
    tower.config = dataclasses.replace(
        tower.config, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def bidirectional(case: Case) -> None:
    case.patch.setattr(openvla, "causal_mask", openvla.bidirectional_mask)


def causal(case: Case) -> None:
    case.patch.setattr(openvla, "bidirectional_mask", openvla.causal_mask)


def no_empty_token(case: Case) -> None:
    case.inputs = dataclasses.replace(case.inputs, prompt_length=case.inputs.prompt_length - 1)


def stop_is_token_1(case: Case) -> None:
    case.change_config(stop_token_id=1)


def placeholders_are_embedded(case: Case) -> None:
    original = openvla.OpenVLAOFT._text_embeddings

    def embedded(self, inputs):
        text, valid, is_placeholder = original(self, inputs)
        token = self.language_model.model.embed_tokens(jnp.asarray([[1]]))
        return jnp.where(is_placeholder[:, :, None], token, text), valid, is_placeholder

    case.patch.setattr(openvla.OpenVLAOFT, "_text_embeddings", embedded)


def states_one_later(case: Case) -> None:
    original = openvla.OpenVLAOFT.action_states
    case.patch.setattr(
        openvla.OpenVLAOFT, "action_states", lambda self, x, length: original(self, x, length + 1)
    )


def cameras_swapped(case: Case) -> None:
    case.inputs = dataclasses.replace(case.inputs, images=case.inputs.images[:, ::-1])


def no_film(case: Case) -> None:
    for block in named_modules(case.model, vision.FiLMedBlock).values():
        for linear in (block.scale, block.shift):
            for parameter in (linear.kernel, linear.bias):
                parameter[...] = jnp.zeros_like(parameter[...])


def no_lora(case: Case) -> None:
    case.patch.setattr(lora, "low_rank", lambda a, b, shape: np.zeros(shape, np.float32))
    case.reload()


def lora_scale_1(case: Case) -> None:
    case.patch.setattr(lora, "_MAX_ALPHA", 32)
    case.reload()


def film_without_stop(case: Case) -> None:
    original = openvla.OpenVLAOFT._text_embeddings

    def without(self, inputs):
        text, valid, is_placeholder = original(self, inputs)
        last = jnp.sum(valid, axis=1, keepdims=True) - 1
        # What is a placeholder is left out of the mean.
        return text, valid, is_placeholder | (jnp.arange(text.shape[1])[None] == last)

    case.patch.setattr(openvla.OpenVLAOFT, "_text_embeddings", without)


MUTATIONS: dict[str, Callable[[Case], None]] = {
    "last vision layer instead of second-to-last": last_layer,
    "tanh GELU in the towers": tanh_gelu_in_towers,
    "tanh GELU in the projector": tanh_gelu_in_projector,
    "ViT LayerNorm eps 1e-5": layer_norm_epsilon,
    "RMSNorm eps 1e-5": rms_norm_epsilon,
    "LayerScale ignored": no_layer_scale,
    "towers' channels swapped (SigLIP first)": siglip_first,
    "register tokens zero": no_registers,
    "unrounded ImageNet mean/std": unrounded_colours,
    "bidirectional prefill": bidirectional,
    "no empty token after 'Out:'": no_empty_token,
    "causal attention (stock transformers)": causal,
    "stop token embedding replaced by token 1": stop_is_token_1,
    "action placeholders keep token-1 embeddings instead of zeros": placeholders_are_embedded,
    "action slice one position later": states_one_later,
    "wrist and primary image swapped": cameras_swapped,
    "FiLM off (gamma=beta=0)": no_film,
    "vision LoRA ignored": no_lora,
    "vision LoRA scaling 1.0 instead of 0.5": lora_scale_1,
    "FiLM mean without the stop token": film_without_stop,
}
# As mutations.json of the three checkpoints lists them.
CASES = [
    ("openvla_tiny", list(MUTATIONS)[:11]),
    ("openvla_oft_tiny", list(MUTATIONS)[10:16]),
    ("openvla_oft_film_tiny", list(MUTATIONS)[10:]),
]


@pytest.mark.parametrize(("name", "mutations"), CASES)
def test_all_recorded_mutations_are_made(references, name, mutations):
    assert set(references(name)[0].mutations) == set(mutations)


@pytest.mark.parametrize(
    ("name", "mutation"), [(name, mutation) for name, mutations in CASES for mutation in mutations]
)
def test_a_porting_mistake_breaks_parity_as_far_as_in_the_reference(
    references, monkeypatch, name, mutation
):
    reference, policy, _ = references(name)
    case = Case(reference, nnx.clone(policy.model), reference.inputs(policy), monkeypatch)
    MUTATIONS[mutation](case)
    found = stages(case.model, case.inputs)
    moved = {
        stage: deviation
        for stage, recorded in reference.arrays.items()
        if stage in found and (deviation := _deviation(found[stage], recorded)) is not None
    }
    broken = {s for s, d in moved.items() if d > reference.tolerance(s)}
    assert broken, f"{mutation} passes for parity"
    recorded = reference.mutations[mutation]
    for stage in _WHOLE:
        if stage in recorded:
            name_here = {"step0_logits": "logits_step0"}.get(stage, stage)
            original = reference.arrays.get(name_here)
            if original is None:
                original = reference.arrays["logits_steps"][0]
            deviation = np.abs(found[name_here] - original).max()
            noise = 4 * reference.noise.get(stage, 1e-5)
            assert abs(deviation - recorded[stage]) <= 0.02 * recorded[stage] + noise, stage
    if "tokens_equal" in recorded:
        equal = np.array_equal(found["action_token_ids"], reference.arrays["action_token_ids"])
        assert equal == recorded["tokens_equal"]


def _deviation(value: np.ndarray, recorded: np.ndarray) -> float | None:
    """Largest deviation; None where another length of the prompt shifts the places."""
    if value.shape != recorded.shape:
        value = value[:, ::PLACES_STEP]
    if value.shape != recorded.shape:
        return None
    return float(np.abs(value - recorded).max())
