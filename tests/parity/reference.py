"""The trimmed reference checkpoints, and the stages of a forward pass under the recorded names."""

import contextlib
import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.prismatic.network import (
    ModelInputs,
    UniVLA,
    action_decoder,
    action_head,
    llama,
    projector,
    vision,
)
from qvla_jax.families.prismatic.network.openvla import Autoregressive
from qvla_jax.inference import Policy, load_policy
from qvla_jax.models.attention import DotProduct
from qvla_jax.models.linear import Linear
from qvla_jax.models.surgery import named_modules

from .trim import FIXTURES, PLACES_STEP

# Largest deviation that counts as parity, relative to the RMS of the recorded array.
RELATIVE = 3e-5
# The reference's own float32 noise (against its float64 rerun) may be larger: then this many times
# it. Both sides have such noise, and the largest of many entries is compared.
NOISE_FACTOR = 3.0

_RECORDED = {
    vision.PatchEmbed: ("__call__",),
    vision.Block: ("__call__",),
    vision.FiLMedBlock: ("__call__",),
    vision.VisionTransformer: ("__call__",),
    vision.VisionBackbone: ("__call__",),
    projector.PrismaticProjector: ("__call__",),
    projector.ProprioProjector: ("__call__",),
    llama.LlamaModel: ("__call__", "fill", "step"),
    llama.LlamaDecoderLayer: ("__call__", "fill", "step"),
    action_head.L1RegressionActionHead: ("__call__",),
    action_head.MLPResNetBlock: ("__call__",),
    action_decoder.UnitRMSNorm: ("__call__",),
    action_decoder.SwishGLU: ("__call__",),
    action_decoder.MAPAttention: ("__call__",),
    action_decoder.MAPBlock: ("__call__",),
    action_decoder.ActionDecoder: ("__call__",),
    Linear: ("__call__",),
    nnx.LayerNorm: ("__call__",),
}

# What runs in place of a method or function, by its owner and name.
Programs = dict[tuple[object, str], Callable[..., object]]


def compiled(method: Callable[..., object]) -> Callable[..., object]:
    """A method of a module as one program for each configuration of the module."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, state, args, kwargs):
        return method(nnx.merge(graphdef, state), *args, **kwargs)

    return lambda self, *args, **kwargs: run(*nnx.split(self), args, kwargs)


def programs_of(methods: Mapping[type, tuple[str, ...]]) -> Programs:
    """Methods of modules, compiled."""
    return {(kind, n): compiled(getattr(kind, n)) for kind, names in methods.items() for n in names}


# To compile every operation takes most of the time of these tests, so what follows is one program
# each. No recorded stage and no change of the code lies inside; a changed attribute of a module is
# part of its configuration.
PROGRAMS: Programs = {
    **programs_of(
        {
            vision.Attention: ("__call__",),
            llama.LlamaDecoderLayer: ("__call__", "fill", "step"),
            DotProduct: ("__call__",),
            Linear: ("__call__",),
            nnx.LayerNorm: ("__call__",),
            nnx.RMSNorm: ("__call__",),
        }
    ),
    (llama, "rotary_angles"): jax.jit(llama.rotary_angles, static_argnums=(1, 2)),
    (jax.nn, "gelu"): jax.jit(jax.nn.gelu, static_argnames="approximate"),
}


def install(programs: Programs, patch: pytest.MonkeyPatch) -> None:
    """Runs these programs in place of what they are compiled from."""
    for (owner, name), program in programs.items():
        patch.setattr(owner, name, program)


@dataclasses.dataclass(frozen=True)
class Reference:
    """One checkpoint with its record."""

    folder: Path
    arrays: dict[str, np.ndarray]
    meta: dict
    noise: dict[str, float]
    mutations: dict[str, dict]

    def tolerance(self, stage: str) -> float:
        """Largest deviation of a stage that counts as parity."""
        recorded = self.arrays[stage].astype(np.float64)
        noise = self.noise.get(stage, 0.0)
        return max(RELATIVE * float(np.sqrt(np.mean(recorded**2))), NOISE_FACTOR * noise)

    def load(self) -> Policy:
        """The policy, through the public entry."""
        key = self.meta["unnorm_key"]
        return load_policy(self.folder, unnorm_key=key)

    def observation(self, sample: int) -> dict:
        """What the reference's processor received in a sample, for `infer(preprocessed=True)`."""
        prefix = f"sample{sample}_" if sample else ""
        if f"{prefix}image" in self.arrays:
            images = self.arrays[f"{prefix}image"][None]
        elif sample:
            images = self.arrays[f"{prefix}pixels"]
        elif "model_image" in self.arrays:
            images = self.arrays["model_image"][None]
        else:
            images = self.arrays["model_images"]
        observation = dict(zip(("image", "wrist_image"), images, strict=False))
        observation["instruction"] = self.meta["samples"][sample]["task"]
        if history := self.meta["samples"][sample].get("history"):
            observation["history"] = history
        if "proprio_raw" in self.arrays:
            observation["state"] = self.arrays[f"{prefix}proprio_raw"]
        return observation

    def inputs(self, policy: Policy, sample: int = 0) -> ModelInputs:
        """Model inputs of a sample, of the recorded token ids where no prompt was recorded."""
        observation = self.observation(sample)
        batch = {
            k: [v] if isinstance(v, str) else np.asarray(v)[None] for k, v in observation.items()
        }
        inputs = policy.prepare(batch, preprocessed=True)
        if observation["instruction"]:
            return inputs
        prefix = f"sample{sample}_" if sample else ""
        ids = self.arrays[f"{prefix}input_ids_with_empty_token"]
        padded = np.full_like(inputs.input_ids, policy.config.pad_token_id)
        padded[:, : ids.shape[1]] = ids
        length = np.asarray([ids.shape[1]], np.int32)
        return dataclasses.replace(inputs, input_ids=padded, prompt_length=length)


def open_reference(name: str, folder: Path) -> Reference:
    """Unpacks a fixture into a folder."""
    with zipfile.ZipFile(FIXTURES / f"{name}.zip") as archive:
        archive.extractall(folder)
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Reference(folder, arrays, **json.loads(arrays.pop("described").tobytes()))


@contextlib.contextmanager
def recording(
    model: nnx.Module,
    kinds: Mapping[type, tuple[str, ...]] = _RECORDED,
    programs: Programs = PROGRAMS,
) -> Iterator[dict[str, list[np.ndarray]]]:
    """Collects the outputs of all modules by path (and `path:in`, first inputs), call by call."""
    paths = {id(module): path for path, module in named_modules(model, nnx.Module).items()}
    calls: dict[str, list[np.ndarray]] = {}

    def wrap(original):
        def method(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            path = paths.get(id(self))
            if path is not None:
                output = result[0] if isinstance(result, tuple) else result
                calls.setdefault(path, []).append(np.asarray(output))
                calls.setdefault(f"{path}:in", []).append(np.asarray(args[0]))
            return result

        return method

    with pytest.MonkeyPatch.context() as patch:
        install(programs, patch)
        for kind, methods in kinds.items():
            for name in methods:
                patch.setattr(kind, name, wrap(getattr(kind, name)))
        yield calls


def stages(model: nnx.Module, inputs: ModelInputs) -> dict[str, np.ndarray]:
    """Every stage of one forward pass under the names of the record, compiled in small parts.

    Sequences are cut to their places before the padding and thinned out as the record is.
    """
    length = model.config.num_prefix_tokens + int(inputs.prompt_length[0])
    tokens_decoded = isinstance(model, Autoregressive)
    if not tokens_decoded:
        length += model.config.num_action_tokens + 1
    found: dict[str, np.ndarray] = {}
    with jax.default_matmul_precision("float32"), recording(model) as calls:
        if tokens_decoded:
            decoded = model.roll_out(inputs)
            found["action_token_ids"] = np.asarray(decoded.tokens)[0]
            found["logits_steps"] = np.asarray(decoded.logits)[0]
            found["logits_step0"] = found["logits_steps"][0]
            if isinstance(model, UniVLA):
                calls.clear()
                model.actions(inputs)
                found |= _decoder_stages(calls)
        else:
            found["action_head_output"] = np.asarray(model(inputs))
            found["normalized_actions"] = found["action_head_output"][0]
        states = calls["language_model.model"][0]
        logits = np.asarray(model.language_model.lm_head(states))
    found["logits" if not tokens_decoded else "logits_prefill"] = logits
    for tower, module in (("dino", "featurizer"), ("siglip", "fused_featurizer")):
        path = f"vision_backbone.{module}"
        found[f"{tower}_patch_embed"] = calls[f"{path}.patch_embed"][0]
        found[f"{tower}_pixels"] = calls[f"{path}.patch_embed:in"][0]
        found[f"{tower}_features"] = calls[path][0]
        for block in range(model.config.vision[0].depth):
            name = f"{path}.blocks.{block}"
            if name in calls:
                found[f"{tower}_block{block}"] = calls[name][0]
            if f"{name}.scale" in calls:
                # Every camera is modulated by the same.
                found[f"{tower}_block{block}_film_gamma"] = calls[f"{name}.scale"][0][:1]
                found[f"{tower}_block{block}_film_beta"] = calls[f"{name}.shift"][0][:1]
    found["fused_patch_features"] = calls["vision_backbone"][0]
    found["projector_output"] = calls["projector"][0]
    found["llm_inputs_embeds"] = calls["language_model.model:in"][0]
    found["llm_final_norm_output"] = states
    for layer in range(model.config.text.num_hidden_layers):
        first, *steps = calls[f"language_model.model.layers.{layer}"]
        found[f"llm_layer{layer}_output"] = first
        if steps:
            found[f"llm_layer{layer}_output_decode"] = np.concatenate(steps, axis=1)
    if tokens_decoded:
        steps = calls["language_model.model"][1:]
        found["llm_final_norm_output_decode"] = np.concatenate(steps, axis=1)
    else:
        head = "action_head.model"
        found["actions_hidden_states"] = calls["action_head:in"][0]
        found["action_head_layer_norm1"] = calls[f"{head}.layer_norm1"][0]
        found["action_head_fc1_pre_relu"] = calls[f"{head}.fc1"][0]
        for block in range(2):
            found[f"action_head_block{block}"] = calls[f"{head}.mlp_resnet_blocks.{block}"][0]
        found["action_head_layer_norm2"] = calls[f"{head}.layer_norm2"][0]
        found["proprio_projector_input"] = calls["proprio_projector:in"][0]
        found["proprio_projector_output"] = calls["proprio_projector"][0][:, 0]
    return {name: thinned(name, value, length) for name, value in found.items()}


def _decoder_stages(calls: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Inputs and outputs of all modules of the action decoder, once for each."""
    found = {
        "latent_states": calls["action_decoder:in"][0],
        "visual_states": calls["action_decoder.visual_pool:in"][0],
    }
    for path, outputs in calls.items():
        if path.startswith("action_decoder") and not path.endswith(":in"):
            (output,) = outputs
            found[path] = output
    return found


def thinned(name: str, value: np.ndarray, length: int) -> np.ndarray:
    """As the record: sequences without padding, and of these every fourth place."""
    if (name.startswith("llm_") and "decode" not in name) or name in ("logits", "logits_prefill"):
        return value[:, :length:PLACES_STEP]
    return value
