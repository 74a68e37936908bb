"""AWQ and SmoothQuant on one layer, against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax.inference.unpacking import RoundingLinear
from qvla_jax.methods.awq import awq
from qvla_jax.methods.smoothquant import smoothing_scales, smoothquant


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def weight(rng):
    return rng.normal(size=(24, 64)).astype(np.float32)


@pytest.fixture
def inputs(rng):
    """Tokens whose inputs have ranges of very different size, as those of transformers do."""
    return rng.normal(size=(300, 64)) * np.exp(2 * rng.normal(size=64))


def rounded(rows, bits, group=None):
    """Absmax with a whole outermost step, by the row or the group."""
    size = rows.shape[1]
    step = size if group is None else group
    result = np.zeros_like(rows)
    for i in range(0, size, step):
        part = rows[:, i : i + step]
        scale = np.abs(part).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 0.5)
        codes = np.clip(np.round(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[:, i : i + step] = codes * scale
    return result


def effective(rows, group=None):
    """The weight that inputs meet: grid values times the inputs' factors."""
    size = rows.codes.shape[1]
    scales = np.repeat(rows.scales, size if group is None else group, axis=1)[:, :size]
    return rows.codes * scales.astype(np.float64) * rows.input_scale


@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, None), (3, 32)])
def test_awq_takes_the_power_of_least_weighted_error(weight, inputs, bits, group):
    magnitude = np.abs(inputs).mean(axis=0)
    candidates = {}
    for power in np.linspace(0, 1, 20):
        s = np.maximum((magnitude / magnitude.max()) ** power, 1e-4)
        s /= np.sqrt(s.max() * s.min())
        change = rounded(weight * s, bits, group) / s - weight
        candidates[power] = np.mean((change * magnitude) ** 2), s
    losses = {power: loss for power, (loss, _) in candidates.items()}
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 1
    found = awq(jnp.asarray(weight), magnitude, bits, group)
    loss = np.mean(((effective(found, group) - weight) * magnitude) ** 2)
    np.testing.assert_allclose(loss, losses[best], rtol=0.05)
    np.testing.assert_allclose(found.input_scale, 1 / candidates[best][1], rtol=2**-8)
    assert loss < 0.9 * losses[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_scales_are_equation_4(weight, inputs, alpha):
    largest = np.abs(inputs).max(axis=0)
    expected = largest**alpha / np.abs(weight).max(axis=0) ** (1 - alpha)
    np.testing.assert_allclose(
        smoothing_scales(jnp.asarray(weight), largest, alpha), expected, rtol=1e-5
    )
    found = smoothquant(jnp.asarray(weight), largest, alpha, 8)
    np.testing.assert_allclose(found.input_scale, 1 / expected, rtol=2**-8)
    change = effective(found) - weight
    plain = rounded(weight / found.input_scale, 8) * found.input_scale - weight
    np.testing.assert_allclose(np.abs(change).mean(), np.abs(plain).mean(), rtol=0.05)


def test_an_input_that_is_always_zero_keeps_its_range(weight, inputs):
    largest = np.abs(inputs).max(axis=0)
    largest[5] = 0
    assert smoothquant(jnp.asarray(weight), largest, 0.5, 8).input_scale[5] == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_smoothing_helps_rounded_activations(weight, inputs, bits):
    """The product with rounded tokens, in float64 beside the layer that policies run."""
    largest = np.abs(inputs).max(axis=0)
    exact = inputs @ weight.T.astype(np.float64)
    errors = {}
    for alpha in (None, 0.5):
        if alpha is None:
            factor, w = np.ones(64), rounded(weight.astype(np.float64), bits)
        else:
            rows = smoothquant(jnp.asarray(weight), largest, alpha, bits)
            factor, w = rows.input_scale.astype(np.float64), rows.codes * rows.scales
        x = inputs * factor
        qmax = 2 ** (bits - 1) - 1
        step = np.abs(x).max(axis=1, keepdims=True) / qmax
        expected = np.round(x / step) * step @ w.T
        layer = RoundingLinear(
            jnp.asarray(w.T, jnp.float32), jnp.zeros(24), jnp.asarray(factor, jnp.float32), bits
        )
        found = np.asarray(layer(jnp.asarray(inputs, jnp.float32)))
        close = np.isclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        assert close.mean() > 0.98  # ties that float32 decides otherwise
        errors[alpha] = np.mean((expected - exact) ** 2)
    assert errors[0.5] < 0.7 * errors[None]
