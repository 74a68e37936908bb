"""OpenVLA-OFT's regression head: an MLP-ResNet over the action placeholders' hidden states."""

import jax
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.models.linear import Linear


def _layer_norm(dim: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class MLPResNetBlock(nnx.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.ffn = nnx.List([_layer_norm(dim, rngs), Linear(dim, dim, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h c"]) -> Float[Array, "b h c"]:
        norm, linear = self.ffn
        return x + jax.nn.relu(linear(norm(x)))


class MLPResNet(nnx.Module):
    """LayerNorm, a hidden layer, two residual blocks, LayerNorm, the output layer."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, *, rngs: nnx.Rngs):
        self.layer_norm1 = _layer_norm(input_dim, rngs)
        self.fc1 = Linear(input_dim, hidden_dim, rngs=rngs)
        self.mlp_resnet_blocks = nnx.List([MLPResNetBlock(hidden_dim, rngs=rngs) for _ in range(2)])
        self.layer_norm2 = _layer_norm(hidden_dim, rngs)
        self.fc2 = Linear(hidden_dim, output_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b h i"]) -> Float[Array, "b h a"]:
        x = jax.nn.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1RegressionActionHead(nnx.Module):
    """Hidden states of the action placeholders [b, h a, c] -> action chunk [b, h, a]."""

    def __init__(self, llm_dim: int, action_horizon: int, action_dim: int, *, rngs: nnx.Rngs):
        self.action_horizon = action_horizon
        self.model = MLPResNet(action_dim * llm_dim, llm_dim, action_dim, rngs=rngs)

    def __call__(self, states: Float[Array, "b h*a c"]) -> Float[Array, "b h a"]:
        return self.model(states.reshape(states.shape[0], self.action_horizon, -1))
