"""Towers against `timm` and Llama against `transformers`, at random small sizes and weights.

The recorded checkpoints fix the sizes; here depth, width, heads, image size, registers, LayerScale
and grouped key-value heads vary. Needs the extra `parity`; `-rP` shows the differences found.

Prismatic's own choices are made here as it makes them: the feature is the second-to-last block
without final norm and prefix tokens, positions belong to patches alone, pixels are normalized for
each tower, and the language model is causal for OpenVLA and bidirectional for OpenVLA-OFT.
"""

import importlib
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.families.prismatic.config import LlamaConfig, VisionTowerConfig
from qvla_jax.families.prismatic.network.llama import (
    LlamaForCausalLM,
    bidirectional_mask,
    causal_mask,
)
from qvla_jax.families.prismatic.network.vision import VisionBackbone

from .reference import RELATIVE

missing = [p for p in ("torch", "timm", "transformers") if importlib.util.find_spec(p) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"needs the extra `parity`; not installed: {', '.join(missing)}"
)
SEEDS = range(6)


@pytest.fixture(scope="module")
def packages():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ("torch", "timm.models.vision_transformer", "transformers")
        torch, vit, transformers = (importlib.import_module(name) for name in names)
    return torch, vit, transformers


def _randomized(torch, module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fills a PyTorch module with random values of lively sizes, and returns them."""
    tensors = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            if parameter.ndim > 1 and not name.endswith(("token", "embed", "latent")):
                value = rng.normal(0.0, np.prod(shape[1:]) ** -0.5, shape)
            else:
                value = rng.normal(
                    float(name.endswith(("norm.weight", "norm1.weight"))), 0.5, shape
                )
            tensors[name] = value.astype(np.float32)
            parameter.copy_(torch.from_numpy(tensors[name]))
    return tensors


def _compare(name: str, ours, theirs) -> None:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    relative = np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2))
    print(f"{name}: largest difference {relative:.1e} of the RMS")
    assert relative <= RELATIVE


def _tower(rng: np.random.Generator, image_size: int, patch_size: int, **kind) -> VisionTowerConfig:
    heads = int(rng.integers(1, 4))
    width = heads * int(rng.choice([4, 8, 12]))
    depth = int(rng.integers(2, 5))
    return VisionTowerConfig(
        timm_id="random",
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=int(width * rng.choice([2.0, 3.7362, 4.0])),
        feature_block=depth - 2,
        final_norm=True,
        mean=tuple(rng.uniform(0.3, 0.6, 3).tolist()),
        std=tuple(rng.uniform(0.2, 0.5, 3).tolist()),
        **kind,
    )


def _as_timm(vit, config: VisionTowerConfig):
    return vit.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=(config.mlp_dim + 0.5) / config.embed_dim,
        class_token=config.class_token,
        reg_tokens=config.num_registers,
        no_embed_class=True,
        init_values=1e-5 if config.layer_scale else None,
        global_pool="map" if config.attention_pool else "token" if config.class_token else "",
        num_classes=0,
    ).eval()


@pytest.mark.parametrize("seed", SEEDS)
def test_towers_match_timm(packages, seed):
    torch, vit, _ = packages
    rng = np.random.default_rng(seed)
    patch, side = int(rng.choice([2, 4, 7])), int(rng.integers(2, 5))
    registers = int(rng.integers(0, 5)) if seed else 4
    dino = _tower(
        rng,
        patch * side,
        patch,
        class_token=True,
        num_registers=registers,
        layer_scale=bool(rng.integers(2)) or not seed,
    )
    siglip = _tower(rng, patch * side, patch, attention_pool=True)
    images = rng.integers(0, 256, (3, 1, patch * side, patch * side, 3), np.uint8)
    public, features = {}, []
    for name, config in (("featurizer", dino), ("fused_featurizer", siglip)):
        tower = _as_timm(vit, config)
        tensors = _randomized(torch, tower, rng)
        public |= {f"{name}.{k.replace('.gamma', '.scale_factor')}": v for k, v in tensors.items()}
        pixels = (images[:, 0].astype(np.float32) / 255.0 - np.float32(config.mean)) / np.float32(
            config.std
        )
        with torch.no_grad():
            (feature,) = tower.get_intermediate_layers(
                torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), n=[config.depth - 2]
            )
        features.append(feature.numpy())
    ours = VisionBackbone((dino, siglip), rngs=nnx.Rngs(seed))
    assign_tensors(ours, public, source="timm")
    with jax.default_matmul_precision("float32"):
        _compare(f"towers, seed {seed}", ours(images), np.concatenate(features, axis=-1))


def _llama(transformers, rng: np.random.Generator) -> tuple[LlamaConfig, object]:
    groups, kv_heads = int(rng.choice([1, 2, 3])), int(rng.integers(1, 4))
    heads = groups * kv_heads
    config = LlamaConfig(
        vocab_size=int(rng.integers(20, 90)),
        hidden_size=heads * int(rng.choice([4, 8, 16])),
        intermediate_size=int(rng.integers(8, 70)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        rope_theta=float(rng.choice([10000.0, 500000.0])),
    )
    return config, transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_llama_matches_transformers(packages, seed):
    torch, _, transformers = packages
    rng = np.random.default_rng(100 + seed)
    config, theirs_config = _llama(transformers, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.LlamaForCausalLM(theirs_config).eval()
    ours = LlamaForCausalLM(config, rngs=nnx.Rngs(seed))
    assign_tensors(ours, _randomized(torch, theirs, rng), source="transformers")
    b, t = 3, int(rng.integers(4, 12))
    embeddings = rng.normal(size=(b, t, config.hidden_size)).astype(np.float32)
    lengths = np.asarray([t, *rng.integers(2, t, b - 1)])
    valid = np.arange(t)[None] < lengths[:, None]

    def reference(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = theirs(
                inputs_embeds=torch.from_numpy(embeddings),
                attention_mask=torch.from_numpy(mask),
                output_hidden_states=True,
                use_cache=False,
            )
        return output.hidden_states[-1].numpy(), output.logits.numpy()

    everywhere = np.broadcast_to(valid[:, None, None], (b, 1, t, t)).copy()
    cases = {
        "causal": (valid.astype(np.int64), causal_mask),  # OpenVLA
        "bidirectional": (everywhere, bidirectional_mask),  # OpenVLA-OFT
    }
    with jax.default_matmul_precision("float32"):
        for name, (mask, ours_mask) in cases.items():
            states, logits = reference(mask)
            found = ours.model(jnp.asarray(embeddings), ours_mask(jnp.asarray(valid)))
            # Padding may attend to anything: nobody reads it.
            _compare(f"Llama, {name}, seed {seed}", found[valid], states[valid])
            _compare(f"  its logits, seed {seed}", ours.lm_head(found)[valid], logits[valid])
        # Through the cache: all but the last places at once, then one by one.
        states, _ = reference(np.ones((b, t), np.int64))
        whole = jnp.ones((b, t - 2), bool)
        _, caches = ours.model.fill(jnp.asarray(embeddings[:, : t - 2]), causal_mask(whole))
        for place in (t - 2, t - 1):
            state, caches = ours.model.step(
                jnp.asarray(embeddings[:, place : place + 1]), jnp.full(b, place), caches
            )
            _compare(
                f"Llama, cached place {place}, seed {seed}", state, states[:, place : place + 1]
            )
