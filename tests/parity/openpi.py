"""The recorded pi0 and pi0.5, and the stages of our network under the recorded names."""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.openpi.network import (
    Conditioning,
    FlowMatching,
    Pi0Inputs,
    Prefix,
    gemma,
    siglip,
)
from qvla_jax.families.openpi.processor import Processor, make_processor
from qvla_jax.families.openpi.robots import SLOTS
from qvla_jax.inference import Policy, load_policy
from qvla_jax.models.linear import Linear

from .reference import Programs, install, programs_of, recording
from .trim_openpi import FIXTURES, PLACES_STEP, THINNED

PRESETS = {"pi0_tiny": "pi0_libero", "pi05_tiny": "pi05_libero"}
# Largest deviation that counts as parity: so many times the reference's own float32 noise (against
# its float64 rerun), and no less than this share of the RMS of the recorded array. The mistakes
# that move little (an epsilon) are seen only so close to the noise.
NOISE_FACTOR = 3.0
RELATIVE = 2e-6

_RECORDED = {
    Linear: ("__call__",),
    nnx.LayerNorm: ("__call__",),
    siglip.MultiHeadAttention: ("__call__",),
    siglip.EncoderBlock: ("__call__",),
    siglip.Siglip: ("__call__",),
    gemma.Block: ("fill", "step"),
    gemma.Gemma: ("embed", "step"),
}
# What runs compiled: no recorded stage lies inside, and mistakes in the code take its place.
PROGRAMS: Programs = {
    **programs_of(
        {
            Linear: ("__call__",),
            nnx.LayerNorm: ("__call__",),
            siglip.MultiHeadAttention: ("__call__",),
            gemma.RMSNorm: ("__call__",),
            gemma.AdaRMSNorm: ("__call__",),
        }
    ),
    (gemma, "rotary_angles"): jax.jit(gemma.rotary_angles, static_argnums=1),
    (gemma, "apply_rotary"): jax.jit(gemma.apply_rotary),
    # Softmax over 800 places, which is most of what these tests compute: worth optimizing.
    (gemma, "attend"): jax.jit(
        gemma.attend, compiler_options={"xla_backend_optimization_level": 2}
    ),
    (jax.nn, "gelu"): jax.jit(jax.nn.gelu, static_argnames="approximate"),
}
_TOWER = "PaliGemma.img"
_LAYERS = "PaliGemma.llm.layers"


@dataclasses.dataclass(frozen=True)
class OpenpiReference:
    """One checkpoint with its record."""

    folder: Path
    arrays: dict[str, np.ndarray]
    meta: dict
    noise: dict[str, float]
    mutations: dict[str, dict]
    tokenizer_cases: list[dict]

    @functools.cached_property
    def policy(self) -> Policy:
        """The policy, through the public entry."""
        return load_policy(
            self.folder, tokenizer=self.tokenizer_file, preset=PRESETS[self.folder.name]
        )

    def processor(self, **changes: object) -> Processor:
        """The policy's processor under another configuration."""
        policy = self.policy
        config = dataclasses.replace(policy.config, **changes)
        files = policy.processor.files()
        return make_processor(config, policy.statistics, files, source="reference")

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer" / "paligemma_tokenizer.model"

    @property
    def inputs(self) -> Pi0Inputs:
        """Both samples, with all three cameras."""
        arrays = self.arrays
        return Pi0Inputs(
            images=np.stack([arrays[f"image_{slot}"] for slot in SLOTS], axis=1),
            image_mask=np.stack([arrays[f"image_mask_{slot}"] for slot in SLOTS], axis=1),
            tokens=arrays["tokenized_prompt"],
            token_mask=arrays["tokenized_prompt_mask"],
            noise=arrays["noise"],
            state=arrays["state"] if self.meta["variant"] == "pi0" else None,
        )

    def tolerance(self, stage: str) -> float:
        """Largest deviation of a stage that counts as parity."""
        recorded = self.arrays[stage].astype(np.float64)
        return max(
            RELATIVE * float(np.sqrt(np.mean(recorded**2))),
            NOISE_FACTOR * self.noise.get(stage, 0.0),
        )

    def deviation(self, stage: str, found: np.ndarray) -> float:
        """Largest deviation from the record, on rows that are read."""
        recorded = self.arrays[stage]
        valid = self.arrays["prefix_mask"]
        if stage in THINNED:
            places = slice(None, None, PLACES_STEP)
            found = found[(slice(None),) * THINNED[stage] + (places,)]
            valid = valid[:, places]
        assert found.shape == recorded.shape, (stage, found.shape, recorded.shape)
        if stage.startswith(("prefix_layer", "prefix_out", "kv_cache")):
            found, recorded = found[valid[: len(found)]], recorded[valid[: len(recorded)]]
        return float(np.abs(found - recorded).max())


def open_openpi(name: str, folder: Path) -> OpenpiReference:
    """Unpacks a fixture into a folder of its name."""
    with zipfile.ZipFile(FIXTURES / f"{name}.zip") as archive:
        archive.extractall(folder / name)
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    described = json.loads(arrays.pop("described").tobytes())
    return OpenpiReference(folder / name, arrays, **described)


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over the prefix and the first step, compiled in small parts."""

    prefix: Prefix
    conditioning: Conditioning
    found: dict[str, np.ndarray]


def stages(model: FlowMatching, inputs: Pi0Inputs, reference: OpenpiReference) -> Run:
    """Every recorded stage up to the first velocity, under the names of the record."""
    config = model.config
    found: dict[str, np.ndarray] = {}
    with (
        jax.default_matmul_precision("float32"),
        recording(model, _RECORDED, PROGRAMS) as calls,
        pytest.MonkeyPatch.context() as patch,
    ):
        tokens, valid = model.embed_prefix(inputs)
        patch.setattr(type(model), "embed_prefix", lambda self, inputs: (tokens, valid))
        prefix = model.prefix(inputs)
        conditioning = model.conditioning(model.times[None])
        velocity = model.velocity(jnp.asarray(inputs.noise), prefix, conditioning.at(0))
        llm = model.PaliGemma.llm
        positions = jnp.cumsum(valid, axis=1) - 1
        # What no policy computes of the last layer.
        before = jnp.asarray(calls[f"{_LAYERS}.{config.language.depth - 2}"][0])
        angles = gemma.rotary_angles(positions, config.language.head_dim)
        last, _ = llm.layers[-1].fill(before, angles, valid[:, None, None])
        out = llm.final_norm(last)
    found["prefix_tokens"] = np.asarray(tokens)
    found["prefix_mask"] = np.asarray(valid)
    found["prefix_positions"] = np.asarray(positions)
    found["prefix_layer_first"] = calls[f"{_LAYERS}.0"][0][:1]
    found["prefix_layer_last"], found["prefix_out"] = np.asarray(last)[:1], np.asarray(out)[:1]
    for place, held in (("first", prefix.held[0]), ("last", prefix.held[-1])):
        found[f"kv_cache_{place}_k"] = np.asarray(held.k).transpose(0, 3, 1, 2)
        found[f"kv_cache_{place}_v"] = np.asarray(held.v).swapaxes(1, 2)
    cameras = len(SLOTS)
    found["image_tokens"] = calls[_TOWER][0][:cameras]
    found["language_tokens"] = calls["PaliGemma.llm"][0]
    block = f"{_TOWER}.Transformer.encoderblock"
    found["siglip_patch_embed"] = calls[f"{_TOWER}.embedding"][0][:1]
    found["siglip_with_posemb"] = calls[f"{block}.0:in"][0][:1]
    found["siglip_block0"] = calls[f"{block}.0"][0][:1]
    found["siglip_block0_attn"] = calls[f"{block}.0.MultiHeadDotProductAttention_0"][0][:1]
    found["siglip_block_last"] = calls[f"{block}.{config.vision.depth - 1}"][0][:1]
    found["siglip_encoder_norm"] = calls[f"{_TOWER}.Transformer.encoder_norm"][0][:1]
    # Every layer but the last one also filled the prefix.
    found["suffix_layers"] = np.stack(
        [
            calls[f"{_LAYERS}.{layer}"][-2 if layer == config.language.depth - 1 else -1]
            for layer in range(config.language.depth)
        ]
    )
    found["suffix_tokens"] = calls["PaliGemma.llm:in"][-1]
    found["suffix_out"] = calls["PaliGemma.llm"][-1]
    found["action_in_proj_out"] = calls["action_in_proj"][0]
    found |= _variant_stages(model, calls, conditioning)
    length = found["suffix_tokens"].shape[1]
    start = found["prefix_mask"].sum(axis=1)[:, None]
    found["suffix_positions"] = start + np.arange(length)[None]
    mask = model.suffix_mask(length)
    own = np.ones((length, length), bool) if mask is None else np.asarray(mask)[0, 0]
    b, s = found["prefix_mask"].shape
    found["suffix_attn_mask"] = np.concatenate(
        [
            np.broadcast_to(found["prefix_mask"][:, None], (b, length, s)),
            np.broadcast_to(own, (b, length, length)),
        ],
        axis=2,
    )
    found["v_t_first_step"] = np.asarray(velocity)
    return Run(prefix, conditioning, found)


def _variant_stages(
    model: FlowMatching, calls: Mapping[str, list[np.ndarray]], conditioning: Conditioning
) -> dict[str, np.ndarray]:
    width = model.config.action_expert.width
    if model.config.variant == "pi0":
        return {
            "time_embedding_steps": np.asarray(conditioning.embedding)[0],
            "state_proj_out": calls["state_proj"][0][:, 0],
            "action_time_mlp_in_out": calls["action_time_mlp_in"][0],
            "action_time_mlp_out_out": calls["action_time_mlp_out"][0],
        }
    steps = len(calls["time_mlp_in"][0][0])
    return {
        "time_embedding_steps": calls["time_mlp_in:in"][0][0],
        # The same for both samples.
        "time_mlp_in_out": np.broadcast_to(calls["time_mlp_in"][0][0, :1], (2, width)),
        "time_mlp_out_out": np.broadcast_to(calls["time_mlp_out"][0][0, :1], (2, width)),
        "adarms_cond_steps": calls["PaliGemma.llm.final_norm_1.Dense_0:in"][0].reshape(
            steps, width
        ),
    }


def integrate(
    model: FlowMatching, noise: np.ndarray, prefix: Prefix, conditioning: Conditioning
) -> dict[str, np.ndarray]:
    """All steps: noisy actions before each and behind the last, and velocities."""
    x = jnp.asarray(noise)
    path, velocities = [x], []
    with jax.default_matmul_precision("float32"), pytest.MonkeyPatch.context() as patch:
        install(PROGRAMS, patch)
        for step in range(model.config.num_steps):
            velocities.append(model.velocity(x, prefix, conditioning.at(step)))
            x = x - 1.0 / model.config.num_steps * velocities[-1]
            path.append(x)
    return {
        "x_t": np.stack(path), "v_t": np.stack(velocities), "actions": np.asarray(path[-1])
    }  # fmt: skip
