"""Grids against a float64 restatement, and their properties."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvla_jax.errors import InputError
from qvla_jax.quantization import Quantizer, QuantizerSettings
from qvla_jax.quantization.bias import bias_shift, corrected_bias
from qvla_jax.quantization.codes import GRID_BITS
from qvla_jax.quantization.grid import dequantize_rows, on_grid, quantize_mixed, quantize_rows

# One shape, so that each bit-width is compiled once.
SHAPE = (5, 12)
ROWS = hnp.arrays(
    np.float32,
    SHAPE,
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def grid_in_float64(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    qmax = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=1, keepdims=True) * np.float32(1 / qmax)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    scale = np.where(scale == 0, 1.0, scale)
    return np.clip(np.rint(weight.astype(np.float64) / scale), -qmax - 1, qmax), scale


@pytest.mark.parametrize("bits", GRID_BITS)
def test_codes_and_scales_equal_a_float64_restatement(bits):
    weight = np.random.default_rng(bits).normal(size=(64, 96)).astype(np.float32)
    codes, scale = quantize_rows(jnp.asarray(weight), bits)
    expected, expected_scale = grid_in_float64(weight, bits)
    np.testing.assert_array_equal(scale, expected_scale)
    # float32 division may land on the other side of a tie that float64 sees exactly.
    assert np.mean(np.asarray(codes) != expected) < 1e-3
    assert np.max(np.abs(np.asarray(codes) - expected)) <= 1


@pytest.mark.parametrize("grid", ["rtn", "fitted"])
def test_rows_with_bits_of_their_own_equal_rows_that_share_theirs_bit_for_bit(grid):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(60, 96)).astype(np.float32) * np.exp(rng.normal(size=(60, 1)) * 4)
    weight[:5] = 0
    bits = np.resize(np.asarray(GRID_BITS, np.int32), 60)
    codes, scale = jax.jit(quantize_mixed, static_argnames="grid")(weight, bits, grid=grid)
    for b in GRID_BITS:
        alike_codes, alike_scale = quantize_rows(jnp.asarray(weight), b, grid=grid)
        np.testing.assert_array_equal(codes[bits == b], alike_codes[bits == b])
        np.testing.assert_array_equal(scale[bits == b], alike_scale[bits == b])


def test_ties_round_to_even():
    # Scale 1: max|w| is 7 at 4 bits, and 7 / 7 is a bfloat16 number.
    weight = jnp.asarray([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    codes, scale = quantize_rows(weight, 4)
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(codes[0], [7, 0, 2, 2, 0, -2, -2, 4])


@pytest.mark.parametrize("bits", GRID_BITS)
@settings(max_examples=40, deadline=None)
@given(weight=ROWS)
def test_grid_properties(bits, weight):
    codes, scale = (np.asarray(a) for a in quantize_rows(jnp.asarray(weight), bits))
    qmax = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8
    assert codes.min() >= -qmax - 1
    assert codes.max() <= qmax
    # The stored scale is a positive bfloat16 number and the grid uses exactly that one.
    assert (scale > 0).all()
    np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.bfloat16).astype(np.float32))
    back = np.asarray(dequantize_rows(jnp.asarray(codes), jnp.asarray(scale)), np.float64)
    np.testing.assert_array_equal(back, codes * scale.astype(np.float64))
    # Even a scale that was rounded down covers the range: no weight moves by more than half a step.
    slack = 1e-6 * np.abs(weight) + 1e-37
    assert (np.abs(back - weight) <= scale / 2 + slack).all()
    # The largest weight keeps the largest code, up to sign.
    big = np.abs(weight).max(axis=1) > 1e-30
    assert (np.abs(codes).max(axis=1)[big] == qmax).all()


@settings(max_examples=25, deadline=None)
@given(weight=ROWS)
def test_symmetric_and_idempotent(weight):
    once = on_grid(jnp.asarray(weight), 4)
    np.testing.assert_array_equal(on_grid(-jnp.asarray(weight), 4), -once)
    # A row that is already on a grid with a bfloat16 scale stays where it is.
    np.testing.assert_allclose(on_grid(once, 4), once, rtol=2**-7, atol=1e-37)


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38, 3e38])
@pytest.mark.parametrize("grid", ["rtn", "fitted"])
def test_zero_tiny_and_huge_rows_stay_finite(bits, value, grid):
    codes, scale = quantize_rows(jnp.full((1, 4), value, jnp.float32), bits, grid=grid)
    back = dequantize_rows(codes, scale)
    assert np.isfinite(np.asarray(back)).all()
    assert (np.asarray(scale) > 0).all()
    if value == 0:
        assert np.abs(back).max() < 1e-36


@pytest.mark.parametrize("bits", GRID_BITS)
@settings(max_examples=25, deadline=None)
@given(weight=ROWS)
def test_a_fitted_row_is_no_worse_and_stays_on_its_grid(bits, weight):
    codes, scale = (np.asarray(a) for a in quantize_rows(jnp.asarray(weight), bits, grid="fitted"))
    np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.bfloat16).astype(np.float32))
    if bits == 2:
        assert set(np.unique(codes)) <= {-3, -1, 1, 3}
        return
    qmax = 2 ** (bits - 1) - 1
    assert codes.min() >= -qmax - 1
    assert codes.max() <= qmax
    plain = np.asarray(on_grid(jnp.asarray(weight), bits), np.float64)
    errors = [np.sum((w - weight) ** 2, axis=1) for w in (codes * scale.astype(np.float64), plain)]
    # The stretch may cost as much as the shrinkage that it undoes.
    assert (errors[0] <= 1.3 * errors[1] + 1e-30).all()


def test_the_fitted_grid_loses_little_of_gaussian_rows():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(200, 192)), jnp.float32)

    def loss(bits, grid):
        return float(jnp.mean(jnp.square(on_grid(weight, bits, grid=grid) - weight)))

    # The best 4-level uniform quantizer of a Gaussian loses 0.1188 (Max 1960); without shrinking,
    # 0.1188 / (1 - 0.1188).
    assert 0.13 < loss(2, "fitted") < 0.138
    assert loss(2, "rtn") > 0.5
    assert loss(3, "fitted") < 0.6 * loss(3, "rtn")
    assert loss(4, "fitted") < 0.8 * loss(4, "rtn")
    assert loss(8, "fitted") <= loss(8, "rtn")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fitted_grid_does_not_shrink_rows(bits):
    weight = jnp.asarray(np.random.default_rng(0).standard_t(5, size=(50, 96)), jnp.float32)
    onto = jnp.sum(weight * on_grid(weight, bits, grid="fitted"), axis=1)
    np.testing.assert_allclose(onto, jnp.sum(weight**2, axis=1), rtol=2**-8)


def test_jit_gives_the_same_scales_as_eager():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)
    eager = quantize_rows(weight, 8)
    jitted = jax.jit(lambda w: quantize_rows(w, 8))(weight)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixed_rows_each_have_their_own_grid_and_16_bits_are_untouched():
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(6, 10)), jnp.float32)
    bits = np.array([0, 2, 3, 4, 8, 16])
    rounding = QuantizerSettings(grid="rtn", rounding="nearest", bias_correction=False)
    mixed = np.asarray(Quantizer(rounding).rows("any", weight, bits))
    for row, b in enumerate(bits):
        np.testing.assert_array_equal(mixed[row], on_grid(weight, int(b))[row])
    assert not mixed[0].any()
    assert mixed[5].tobytes() == np.asarray(weight[5]).tobytes()


@pytest.mark.parametrize("bits", [1, 5, 0, 16])
def test_a_bit_width_without_a_grid_is_refused(bits):
    with pytest.raises(InputError, match=f"no grid has {bits} bits"):
        quantize_rows(jnp.ones((1, 4)), bits)


def test_bias_correction_makes_the_mean_output_exact():
    rng = np.random.default_rng(2)
    x = rng.normal(1.0, 2.0, size=(200, 12)).astype(np.float32)
    weight = rng.normal(size=(6, 12)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    rounding = QuantizerSettings(grid="rtn", rounding="nearest", bias_correction=False)
    bits = np.array([0, 2, 3, 4, 8, 16])
    quantized = Quantizer(rounding).rows("any", jnp.asarray(weight), bits)
    new = corrected_bias(jnp.asarray(weight), quantized, jnp.asarray(x.mean(axis=0)), bias)
    before = (x @ weight.T + bias).mean(axis=0)
    after = (x @ np.asarray(quantized).T + np.asarray(new)).mean(axis=0)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    # The pruned channel is its mean output, the 16-bit channel keeps its bias bit for bit.
    np.testing.assert_allclose(new[0], before[0], rtol=1e-5)
    assert np.asarray(new)[5] == bias[5]


def test_without_a_bias_the_shift_is_the_bias():
    weight, mean = jnp.ones((2, 3)), jnp.arange(3.0)
    quantized = jnp.zeros((2, 3))
    np.testing.assert_array_equal(
        corrected_bias(weight, quantized, mean, None), bias_shift(weight, quantized, mean)
    )
