import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.prismatic.config import LlamaConfig, preset
from qvla_jax.families.prismatic.network.llama import (
    LlamaModel,
    apply_rotary,
    bidirectional_mask,
    causal_mask,
    rotary_angles,
)
from qvla_jax.families.prismatic.network.vision import PatchEmbed
from qvla_jax.models.attention import attention
from qvla_jax.models.linear import Linear


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_is_the_float64_product_over_any_leading_axes(use_bias):
    layer = Linear(5, 7, use_bias=use_bias, rngs=nnx.Rngs(0))
    x = _normal(2, 3, 4, 5)
    expected = x.astype(np.float64) @ np.asarray(layer.kernel[...], np.float64)
    if use_bias:
        layer.bias[...] = jnp.arange(7.0)
        expected = expected + np.arange(7.0)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_library_one(kv_heads):
    q, k, v = _normal(2, 6, 4, 8), _normal(2, 9, kv_heads, 8, seed=1), _normal(2, 9, kv_heads, 8)
    mask = np.random.default_rng(3).random((2, 1, 6, 9)) < 0.7
    mask[..., 0] = True
    expected = jax.jit(jax.nn.dot_product_attention)(q, k, v, mask=mask)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v, mask), expected, atol=2e-6)


def test_rotary_embedding_rotates_half_split_pairs():
    x, theta, head_dim = _normal(1, 5, 2, 8), 100.0, 8
    angles = rotary_angles(jnp.arange(5)[None], head_dim, theta)
    rotated = np.asarray(apply_rotary(jnp.asarray(x), angles))
    for position in range(5):
        for pair in range(4):
            angle = position * theta ** (-2 * pair / head_dim)
            z = x[0, position, :, pair] + 1j * x[0, position, :, pair + 4]
            z = z * np.exp(1j * angle)
            np.testing.assert_allclose(rotated[0, position, :, pair], z.real, atol=1e-5)
            np.testing.assert_allclose(rotated[0, position, :, pair + 4], z.imag, atol=1e-5)


def test_patch_embedding_is_the_public_convolution():
    config = preset("tiny-test").vision[0]
    layer = PatchEmbed(config, rngs=nnx.Rngs(0))
    pixels = _normal(2, 32, 32, 3)
    p = config.patch_size
    weight = np.asarray(layer.proj.kernel[...]).T.reshape(config.embed_dim, 3, p, p)
    expected = jax.lax.conv_general_dilated(
        pixels.transpose(0, 3, 1, 2), weight, (p, p), "VALID"
    ).reshape(2, config.embed_dim, -1)
    np.testing.assert_allclose(
        layer(jnp.asarray(pixels)), expected.transpose(0, 2, 1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("mask_of", "sees_future"), [(causal_mask, False), (bidirectional_mask, True)]
)
def test_masks_decide_who_sees_later_and_padded_positions(mask_of, sees_future):
    model = jax.jit(LlamaModel(preset("tiny-test").text, rngs=nnx.Rngs(0)).__call__)
    x = _normal(1, 6, 32)
    valid = jnp.asarray([[True] * 5 + [False]])
    changed, padded = x.copy(), x.copy()
    changed[0, 4] += 1.0
    padded[0, 5] += 1.0
    before = np.asarray(model(jnp.asarray(x), mask_of(valid)))
    after = np.asarray(model(jnp.asarray(changed), mask_of(valid)))
    assert (np.abs(after - before)[0, :4].max() > 1e-4) == sees_future
    after_padding = np.asarray(model(jnp.asarray(padded), mask_of(valid)))
    np.testing.assert_array_equal(after_padding[0, :5], before[0, :5])


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_tokens_through_the_cache_are_those_of_the_whole_sequence(key_value_heads):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_value_heads,
    )  # fmt: skip
    model = LlamaModel(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    # Prompts of 5 and 3 tokens, padded to 6 places that later tokens take over.
    lengths, steps = np.array([5, 3]), 3
    sequences = rng.normal(size=(2, 5 + steps, 32)).astype(np.float32)
    prompt = sequences[:, :6].copy()
    prompt[0, 5], prompt[1, 3:] = 7.0, 7.0
    valid = jnp.arange(6)[None] < lengths[:, None]
    fill, step_on, call = map(jax.jit, (model.fill, model.step, model.__call__))
    with jax.default_matmul_precision("float32"):
        _, caches = fill(prompt, causal_mask(valid))
        for step in range(steps):
            places = lengths + step
            token = sequences[np.arange(2), places][:, None]
            found, caches = step_on(token, jnp.asarray(places), caches)
            for row, place in enumerate(places):
                whole = sequences[row : row + 1, : place + 1]
                mask = causal_mask(jnp.ones((1, place + 1), bool))
                expected = call(whole, mask)[0, -1]
                np.testing.assert_allclose(found[row, 0], expected, rtol=2e-5, atol=2e-5)
