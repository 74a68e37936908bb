"""Learned clips and scales: the grid in float64, gradients, and what fitting brings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.methods.omniquant import Grid, fake_quantized, fit_block, learned_rows
from qvla_jax.models.linear import Linear


def start(weight, groups=1, clip=4.0):
    return {
        "clip": jnp.full((weight.shape[0], groups), clip),
        "log_scale": jnp.zeros(weight.shape[1]),
    }


@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, 16), (2, None)])
def test_the_grid_is_the_clipped_range(bits, group):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 40))
    clip = rng.normal(size=(6, 1 if group is None else 3))
    found = fake_quantized(
        jnp.asarray(weight, jnp.float32), jnp.asarray(clip, jnp.float32), Grid(bits, group, 16)
    )
    step = 40 if group is None else group
    for number, i in enumerate(range(0, 40, step)):
        part = weight[:, i : i + step]
        share = 1 / (1 + np.exp(-clip[:, number : number + 1]))
        size = share * np.abs(part).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 0.5)
        codes = np.clip(np.round(part / size), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        np.testing.assert_allclose(found[:, i : i + step], codes * size, atol=1e-5)


def test_gradients_of_the_clip_are_those_of_the_published_quantizer():
    """d w_hat / d step is the code where the weight is clipped, and q - w / step elsewhere."""
    weight = np.random.default_rng(1).normal(size=(1, 12))
    grid = Grid(3, None, 16)

    def total(clip):
        return jnp.sum(fake_quantized(jnp.asarray(weight, jnp.float32), clip, grid))

    clip = 0.3
    share = 1 / (1 + np.exp(-clip))
    size = share * np.abs(weight).max() / 3.5
    ratio = weight / size
    codes = np.clip(np.round(ratio), -4, 3)
    inside = (np.round(ratio) >= -4) & (np.round(ratio) <= 3)
    by_step = np.where(inside, codes - ratio, codes).sum()
    expected = by_step * np.abs(weight).max() / 3.5 * share * (1 - share)
    found = jax.grad(total)(jnp.full((1, 1), clip))
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-3)


class TwoLayers(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc1 = Linear(32, 48, rngs=rngs)
        self.fc2 = Linear(48, 32, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.fc2(jax.nn.silu(self.fc1(x)))


@pytest.mark.parametrize("activation_bits", [16, 4])
def test_fitting_lowers_the_error_of_the_block(activation_bits):
    block, grid = TwoLayers(), Grid(3, None, activation_bits)
    key = jax.random.key(0)
    x = jax.random.normal(key, (6, 4, 5, 32)) * jnp.exp(jax.random.normal(key, (1, 1, 1, 32)))
    targets = jnp.stack([block(part) for part in x])
    weights = {"fc1": block.fc1.kernel[...].T, "fc2": block.fc2.kernel[...].T}
    begin = {name: start(w) for name, w in weights.items()}
    learned, losses = fit_block(block, begin, (x,), targets, grid, epochs=60)
    assert min(losses) < 0.8 * losses[0]

    def stored_error(values):
        """Of what is stored, by numpy, where activations are not rounded."""
        w = {}
        for name, own in values.items():
            rows = learned_rows(weights[name], own, grid)
            scale = 1.0 if rows.input_scale is None else rows.input_scale
            w[name] = rows.codes * rows.scales.astype(np.float64) * scale
        hidden = np.asarray(x, np.float64) @ w["fc1"].T + np.asarray(block.fc1.bias[...])
        y = np.asarray(x) + hidden / (1 + np.exp(-hidden)) @ w["fc2"].T
        return np.mean((y - np.asarray(targets)) ** 2)

    if activation_bits == 16:
        np.testing.assert_allclose(stored_error(begin), losses[0], rtol=0.5)
        assert stored_error(learned) < 0.85 * stored_error(begin)
        assert all((own["log_scale"] == 0).all() for own in learned.values())
    else:
        assert any((own["log_scale"] != 0).any() for own in learned.values())
