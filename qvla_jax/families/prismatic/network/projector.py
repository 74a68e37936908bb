"""Projectors into the language model's embedding space."""

import jax
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.models.linear import Linear


class PrismaticProjector(nnx.Module):
    """Fused patch features [b, t, v] -> embeddings [b, t, c] (OpenVLA's fused projector)."""

    def __init__(self, vision_dim: int, llm_dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(vision_dim, 4 * vision_dim, rngs=rngs)
        self.fc2 = Linear(4 * vision_dim, llm_dim, rngs=rngs)
        self.fc3 = Linear(llm_dim, llm_dim, rngs=rngs)

    def __call__(self, features: Float[Array, "b t v"]) -> Float[Array, "b t c"]:
        x = jax.nn.gelu(self.fc1(features), approximate=False)
        x = jax.nn.gelu(self.fc2(x), approximate=False)
        return self.fc3(x)


class ProprioProjector(nnx.Module):
    """Normalized proprio [b, p] -> one token [b, 1, c] (OpenVLA-OFT)."""

    def __init__(self, proprio_dim: int, llm_dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(proprio_dim, llm_dim, rngs=rngs)
        self.fc2 = Linear(llm_dim, llm_dim, rngs=rngs)

    def __call__(self, proprio: Float[Array, "b p"]) -> Float[Array, "b 1 c"]:
        return self.fc2(jax.nn.gelu(self.fc1(proprio), approximate=False))[:, None]
