"""Blocks of pi0 and pi0.5 in PyTorch, as in `qvla_jax.families.openpi.network`, to time beside."""

import torch
from torch import nn
from torch.nn import functional

from qvla_jax.families.openpi.config import GemmaConfig, SiglipConfig


class TowerBlock(nn.Module):
    """Of SigLIP."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim, self.heads = config.width, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(dim, dim))
        self.fc1, self.fc2 = nn.Linear(dim, config.mlp_dim), nn.Linear(config.mlp_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GemmaBlock(nn.Module):
    """Of the language model or of the action expert, whose norms pi0.5 modulates."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool):
        super().__init__()
        dim, self.config, self.adaptive = config.width, config, adaptive
        inner, shared = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.norm1, self.norm2 = (
            nn.RMSNorm(dim, eps=1e-6, elementwise_affine=not adaptive) for _ in range(2)
        )
        self.q, self.k, self.v = (
            nn.Linear(dim, width, bias=False) for width in (inner, shared, shared)
        )
        self.o = nn.Linear(inner, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, config.mlp_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(config.mlp_dim, dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        held: tuple[torch.Tensor, torch.Tensor] | None = None,
        modulation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The block's output, and its keys and values; `held` are those of the prefix."""
        y, gate = self._normalized(self.norm1, x, modulation)

        def rotated(z: torch.Tensor) -> torch.Tensor:
            first, second = z.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        q, k, v = (
            proj(y).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        q, k = rotated(q), rotated(k)
        if held is not None:
            k, v = (torch.cat(both, dim=2) for both in zip(held, (k, v), strict=True))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + gate * self.o(y.transpose(1, 2).flatten(2))
        y, gate = self._normalized(self.norm2, x, modulation)
        y = functional.gelu(self.gate(y), approximate="tanh") * self.up(y)
        return x + gate * self.down(y), (k, v)

    def _normalized(
        self, norm: nn.Module, x: torch.Tensor, modulation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Normalized tokens, and the gate of what follows."""
        if modulation is None:
            return norm(x), 1.0
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return norm(x) * (1 + scale) + shift, gate
