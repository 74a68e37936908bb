"""OpenVLA-OFT in PyTorch, module by module as in `qvla_jax.models`, to compare speeds with."""

import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from qvla_jax.families.prismatic.config import LlamaConfig, OpenVLAConfig, VisionTowerConfig
from qvla_jax.inference import Policy


class Attention(nn.Module):
    """Of a vision tower."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        )


class Mlp(nn.Module):
    """Of a vision tower."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """Of a vision tower."""

    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        dim = config.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, config.num_heads), Mlp(dim, config.mlp_dim)
        self.ls1 = Scale(dim) if config.layer_scale else nn.Identity()
        self.ls2 = Scale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """Patches as rows of a matrix, as in the policy, times one linear layer."""

    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.size = config.patch_size
        self.proj = nn.Linear(3 * self.size**2, config.embed_dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        b, height, width, _ = pixels.shape
        p = self.size
        x = pixels.reshape(b, height // p, p, width // p, p, 3).permute(0, 1, 3, 5, 2, 4)
        return self.proj(x.reshape(b, -1, 3 * p * p))


class Tower(nn.Module):
    """A vision tower without what no policy reads."""

    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.config, dim = config, config.embed_dim
        self.patch_embed = Patches(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, dim))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.feature_block + 1)])
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed((images.float() / 255.0 - self.mean) / self.std) + self.pos_embed
        prefix = [
            getattr(self, name).expand(len(x), -1, -1)
            for name in ("cls_token", "reg_token")
            if hasattr(self, name)
        ]
        x = torch.cat([*prefix, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, -self.config.num_patches :]


class SelfAttention(nn.Module):
    """Of the language model, with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        b, t, c = x.shape

        def heads(proj: nn.Linear) -> torch.Tensor:
            return proj(x).reshape(b, t, self.heads, -1).transpose(1, 2)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        y = functional.scaled_dot_product_attention(
            rotate(heads(self.q_proj)), rotate(heads(self.k_proj)), heads(self.v_proj), mask
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, c))


class GatedMlp(nn.Module):
    """Of the language model."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Of the language model."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(dim, eps=eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=eps)
        self.mlp = GatedMlp(dim, config.intermediate_size)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *others)
        return x + self.mlp(self.post_attention_layernorm(x))


class Residual(nn.Module):
    """Of the action head."""

    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.ModuleList([nn.LayerNorm(dim), nn.Linear(dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.relu(self.ffn[1](self.ffn[0](x)))


class Twin(nn.Module):
    """OpenVLA-OFT without FiLM, its modules named as the policy's."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.config, text = config, config.text
        dim, vision = text.hidden_size, sum(t.embed_dim for t in config.vision)
        self.vision_backbone = nn.ModuleDict(
            {
                "featurizer": Tower(config.vision[0]),
                "fused_featurizer": Tower(config.vision[1]),
            }
        )
        self.projector = nn.ModuleDict(
            {
                "fc1": nn.Linear(vision, 4 * vision),
                "fc2": nn.Linear(4 * vision, dim),
                "fc3": nn.Linear(dim, dim),
            }
        )
        self.proprio_projector = nn.ModuleDict(
            {"fc1": nn.Linear(config.proprio_dim, dim), "fc2": nn.Linear(dim, dim)}
        )
        model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(text.vocab_size, dim),
                "layers": nn.ModuleList([Layer(text) for _ in range(text.num_hidden_layers)]),
                "norm": nn.RMSNorm(dim, eps=text.rms_norm_eps),
            }
        )
        self.language_model = nn.ModuleDict({"model": model})
        head = nn.ModuleDict(
            {
                "layer_norm1": nn.LayerNorm(config.action_dim * dim),
                "fc1": nn.Linear(config.action_dim * dim, dim),
                "mlp_resnet_blocks": nn.ModuleList([Residual(dim) for _ in range(2)]),
                "layer_norm2": nn.LayerNorm(dim),
                "fc2": nn.Linear(dim, config.action_dim),
            }
        )
        self.action_head = nn.ModuleDict({"model": head})

    def forward(
        self, images: torch.Tensor, ids: torch.Tensor, length: torch.Tensor, proprio: torch.Tensor
    ) -> torch.Tensor:
        config, gelu = self.config, functional.gelu
        b = len(images)
        flat = images.flatten(0, 1)
        towers = [self.vision_backbone[n](flat) for n in ("featurizer", "fused_featurizer")]
        features = torch.cat(towers, dim=-1).reshape(b, -1, sum(t.shape[-1] for t in towers))
        p, q = self.projector, self.proprio_projector
        prefix = torch.cat(
            [
                p["fc3"](gelu(p["fc2"](gelu(p["fc1"](features))))),
                q["fc2"](gelu(q["fc1"](proprio)))[:, None],
            ],
            dim=1,
        )
        actions = config.num_action_tokens
        ids = functional.pad(ids, (0, actions + 1))
        place = torch.arange(ids.shape[1])[None]
        stop = length[:, None] + actions
        holder = (place >= length[:, None]) & (place < stop)
        ids = torch.where(place == stop, config.stop_token_id, ids)
        ids = torch.where(place > stop, config.pad_token_id, ids)
        model = self.language_model["model"]
        text = model["embed_tokens"](ids).masked_fill(holder[:, :, None], 0.0)
        x = torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1)
        valid = torch.cat(
            [torch.ones(b, 1 + prefix.shape[1], dtype=torch.bool), (place <= stop)[:, 1:]], dim=1
        )
        half = x.shape[-1] // config.text.num_attention_heads // 2
        frequency = config.text.rope_theta ** -(torch.arange(half) / half)
        angles = torch.arange(x.shape[1])[:, None] * frequency[None]
        for layer in model["layers"]:
            x = layer(x, angles.cos(), angles.sin(), valid[:, None, None])
        x = model["norm"](x)
        first = prefix.shape[1] + length - 1
        states = torch.stack([row[i : i + actions] for row, i in zip(x, first, strict=True)])
        head = self.action_head["model"]
        y = states.reshape(b, config.action_horizon, -1)
        y = functional.relu(head["fc1"](head["layer_norm1"](y)))
        for block in head["mlp_resnet_blocks"]:
            y = block(y)
        return head["fc2"](head["layer_norm2"](y))


def twin_of(policy: Policy) -> Twin:
    """The twin with the policy's weights."""
    twin = Twin(policy.config)
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(policy.model, nnx.Param)):
        *module, name = map(str, path)
        value = np.array(leaf[...])
        value = value.T.copy() if name == "kernel" else value
        weights[".".join([*module, names.get(name, name)])] = torch.from_numpy(value)
    missing = twin.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise SystemExit(f"the twin has weights that the policy lacks: {missing}")
    return twin.eval()
