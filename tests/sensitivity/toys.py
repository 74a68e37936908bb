"""A policy of a few small layers with every feature that the methods have to handle.

Two cameras, two parallel towers, a tower block that no forward pass reaches, padding, layers with
and without bias, and an action head that is not quantized. It compiles in a second.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.families.layout import Layout
from qvla_jax.inference import Policy
from qvla_jax.models.linear import Linear
from qvla_jax.quantization import LayerRules

CAMERAS, PATCHES, TEXT, WIDTH, HORIZON, ACTIONS = 2, 3, 4, 6, 2, 3
UNREACHED = "vision_backbone.featurizer.blocks.1.fc"
LLM = "language_model.model.layers.1.mlp"


class Block(nnx.Module):
    def __init__(self, width: int, linear: bool, rngs: nnx.Rngs):
        self.fc = Linear(width, width, rngs=rngs, bias_init=nnx.initializers.normal(0.3))
        self.linear = linear

    def __call__(self, x):
        y = self.fc(x)
        return x + (y if self.linear else jnp.tanh(y))


class Tower(nnx.Module):
    def __init__(self, blocks: int, linear: bool, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(WIDTH, linear, rngs) for _ in range(blocks)])

    def __call__(self, x):
        return self.blocks[0](x)


class Backbone(nnx.Module):
    def __init__(self, linear: bool, rngs: nnx.Rngs):
        self.featurizer = Tower(2, linear, rngs)
        self.fused_featurizer = Tower(1, linear, rngs)

    def __call__(self, images):
        flat = images.reshape(-1, *images.shape[2:])
        features = jnp.concatenate([self.featurizer(flat), self.fused_featurizer(flat)], axis=-1)
        return features.reshape(images.shape[0], -1, features.shape[-1])


class Layer(nnx.Module):
    def __init__(self, linear: bool, rngs: nnx.Rngs):
        self.attn = Linear(2 * WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.mlp = Linear(2 * WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.linear = linear

    def __call__(self, x, valid):
        mixed = self.attn(x * valid[:, :, None])
        x = x + 0.3 * mixed.mean(axis=1, keepdims=True) + 0.3 * mixed
        y = self.mlp(x)
        return x + (y if self.linear else jax.nn.silu(y))


class Inner(nnx.Module):
    def __init__(self, linear: bool, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(linear, rngs) for _ in range(2)])


class Language(nnx.Module):
    def __init__(self, linear: bool, rngs: nnx.Rngs):
        self.model = Inner(linear, rngs)


class Toy(nnx.Module):
    def __init__(self, *, linear: bool, seed: int):
        rngs = nnx.Rngs(seed)
        self.vision_backbone = Backbone(linear, rngs)
        self.language_model = Language(linear, rngs)
        self.action_head = Linear(2 * WIDTH, HORIZON * ACTIONS, rngs=rngs)

    def __call__(self, inputs):
        x = jnp.concatenate([self.vision_backbone(inputs["image"]), inputs["text"]], axis=1)
        place = jnp.arange(x.shape[1], dtype=x.dtype)[None]
        valid = (place < inputs["length"][:, None]).astype(x.dtype)
        for layer in self.language_model.model.layers:
            x = layer(x, valid)
        pooled = (x * valid[:, :, None]).sum(axis=1) / inputs["length"][:, None]
        return self.action_head(pooled).reshape(-1, HORIZON, ACTIONS)

    def actions(self, inputs, conditioning=None):
        return self(inputs)


class Config:
    action_dim = ACTIONS
    action_horizon = HORIZON
    decoding = "l1"

    def to_dict(self) -> dict[str, Any]:
        return {"name": "toy"}

    def identity(self) -> dict[str, Any]:
        return self.to_dict()


def take_inputs(batch: dict[str, Any], *, preprocessed: bool = False) -> dict[str, Any]:
    del preprocessed
    return {key: batch[key] for key in ("image", "text", "length")}


LAYOUT = Layout(
    rules=LayerRules(include=(r"vision_backbone\.", r"language_model\.model\.")),
    kept=(r"action_head",),
    stages=(r".+\.(blocks|layers)\.\d+",),
    parts=(r"vision_backbone",),
    independent=(
        (r"vision_backbone\.featurizer\.", r"vision_backbone\.fused_featurizer\."),
        (r"vision_backbone\.fused_featurizer\.", r"vision_backbone\.featurizer\."),
    ),
    module_types=((r"\.(model\.layers|blocks)\.\d+", ""), (r"^vision_backbone\.", "")),
    action_entries=tuple(range(ACTIONS)),
)


class ToyPolicy(Policy):
    """Of no family: what the methods ask of one is answered here."""

    layout, decodes, conditioning = LAYOUT, False, None


def toy_policy(*, linear: bool = False, seed: int = 0) -> Policy:
    parts: dict[str, Any] = {"config": Config(), "processor": take_inputs, "statistics": {}}
    return ToyPolicy(model=Toy(linear=linear, seed=seed), **parts)


@dataclasses.dataclass
class ToyFrames:
    frames: int
    seed: int = 0
    padding: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.manifest = {"sha256": f"toy-{self.frames}-{self.seed}"}
        longest = CAMERAS * PATCHES + TEXT
        self.arrays = {
            "image": rng.normal(0.5, 1, (self.frames, CAMERAS, PATCHES, WIDTH)),
            "text": rng.normal(-0.5, 1, (self.frames, TEXT, 2 * WIDTH)),
            "length": np.full(self.frames, longest)
            if not self.padding
            else rng.integers(longest - TEXT + 1, longest + 1, self.frames),
        }
        self.arrays = {key: value.astype(np.float32) for key, value in self.arrays.items()}

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, self.frames, size):
            yield {key: value[start : start + size] for key, value in self.arrays.items()}

    def whole(self) -> dict[str, Any]:
        return self.arrays
