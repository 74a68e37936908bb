"""qwix's numerics through the adapters, against the published formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax.methods.gptq import gptq
from qvla_jax.methods.numerics import nearest

# Inputs; qwix compiles GPTQ anew for each.
SIZE = 20


def groups_of(weight, group):
    """Slices of the inputs that share a scale."""
    size = weight.shape[1]
    step = size if group is None else group
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def scale_of(rows, bits):
    return np.abs(rows).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 0.5)


def codes_of(rows, scale, bits):
    return np.clip(np.round(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def dequantized(rows, group):
    size = rows.codes.shape[1]
    scales = np.repeat(rows.scales, size if group is None else group, axis=1)[:, :size]
    return rows.codes * scales.astype(np.float64)


@pytest.fixture
def weight(rng):
    return rng.normal(size=(12, SIZE)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16, 48])
def test_nearest_is_absmax_with_a_whole_outermost_step(weight, bits, group):
    found = nearest(jnp.asarray(weight), bits, group)
    parts = groups_of(weight, group)
    assert found.scales.shape == (12, len(parts))
    for number, part in enumerate(parts):
        rows = weight[:, part].astype(np.float64)
        scale = scale_of(rows, bits)
        # Stored in bfloat16: 8 significant bits.
        np.testing.assert_allclose(found.scales[:, number : number + 1], scale, rtol=2**-8)
        ratio = rows / scale
        clear = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-4
        np.testing.assert_array_equal(
            found.codes[:, part][clear], codes_of(rows, scale, bits)[clear]
        )


def test_a_row_of_zeros_stays_zero():
    found = nearest(jnp.zeros((2, 8)), 4, None)
    assert not found.codes.any()
    assert (found.scales > 0).all()


def optimal_brain_quantization(weight, hessian, bits, group):
    """Frantar et al. 2023, equation 2, input by input, each time with a new inverse."""
    work, size = weight.astype(np.float64).copy(), weight.shape[1]
    damped = hessian + 0.01 * np.mean(np.diagonal(hessian)) * np.eye(size)
    result = np.zeros_like(work)
    for part in groups_of(weight, group):
        # The grid is fixed when the group is reached. In one block of inputs that is before any
        # of its errors are fed back: qwix looks at the block as it was at its start.
        scale = scale_of(weight[:, part].astype(np.float64), bits)
        for i in range(part.start, part.stop):
            rest = slice(i, size)
            inverse = np.linalg.inv(damped[rest, rest])
            result[:, i] = (codes_of(work[:, i : i + 1], scale, bits) * scale)[:, 0]
            error = (work[:, i] - result[:, i]) / inverse[0, 0]
            work[:, rest] -= np.outer(error, inverse[0])
    return result


@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, None), (2, None), (3, 16)])
def test_gptq_is_optimal_brain_quantization_in_input_order(rng, weight, bits, group):
    inputs = rng.normal(size=(200, SIZE)) @ rng.normal(size=(SIZE, SIZE))
    hessian = inputs.T @ inputs
    expected = optimal_brain_quantization(weight, hessian, bits, group)
    rows = gptq(jnp.asarray(weight), hessian, bits, group)
    found = dequantized(rows, group)

    def error(values):
        change = values - weight
        return np.einsum("cj,jk,ck->c", change, hessian, change)

    # A tie that float32 decides otherwise changes the rest of its row.
    same = np.isclose(found, expected, rtol=2**-7, atol=1e-9).all(axis=1)
    assert same.mean() >= 0.75
    np.testing.assert_allclose(error(found)[same], error(expected)[same], rtol=0.15)
    plain = dequantized(nearest(jnp.asarray(weight), bits, group), group)
    assert error(found).sum() < 0.8 * error(plain).sum()
    assert rows.codes.min() >= -(2 ** (bits - 1))
    assert rows.codes.max() < 2 ** (bits - 1)


def test_inputs_that_are_always_zero_have_code_0(weight):
    hessian = np.eye(SIZE)
    hessian[3, 3] = 0
    assert not gptq(jnp.asarray(weight), hessian, 4).codes[:, 3].any()
