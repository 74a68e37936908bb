"""Every implementation against a float64 product with the dequantized weight."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels import cpu
from qvla_jax.kernels.activations import quantize_activations

from .weights import packed_weights, random_bits, random_weight

CHECKS = settings(deadline=None, max_examples=8)
# Interpreted: every example is compiled anew, and that takes longest.
FEW_CHECKS = settings(deadline=None, max_examples=4)
COMPILED = ("reference", "cpu")
# The Triton kernel is for few machines, and in test_pallas.py.
IMPLEMENTATIONS = tuple(name for name in kernels.implementations() if name != "pallas_triton")
INTERPRETED = tuple(name for name in IMPLEMENTATIONS if name not in COMPILED)


def each_of(names):
    return pytest.mark.parametrize(
        "implementation",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    name == "cpu" and cpu.library() is None, reason="no compiled CPU kernel"
                ),
            )
            for name in names
        ],
    )


each_implementation = each_of(IMPLEMENTATIONS)


def runs(implementation, w):
    """Whether the implementation takes the weight; what it refuses, it refuses with the reason."""
    if implementation in COMPILED or w.source_dtype == "bfloat16":
        return True
    if not any(segment.bits == 16 for segment in w.segments):
        return True
    with pytest.raises(InputError, match="must be bfloat16"):
        kernels.prepare(w, implementation)
    return False


def rounded(x, bits):
    """The definition in numpy: codes in float32, as rounding is there, values in float64."""
    x = np.asarray(x, np.float32)
    if bits == 16:
        return x.astype(np.float64)
    qmax = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    codes = np.round(x * (qmax / np.where(largest == 0, np.float32(1), largest)))
    return codes.astype(np.float64) * largest / float(qmax)


def expected(x, w, w_hat, bias, activation_bits):
    y = rounded(x, activation_bits) @ w_hat.T
    if activation_bits < 16:  # beside rounded inputs, rows of 16 bits meet bfloat16 ones
        source = w.bits() == 16
        half = np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)
        y[..., source] = half @ w_hat[source].T
    return y + bias


def tolerance(x, w_hat, eps):
    """eps times the length of the random walk that rounding errors make."""
    return (
        eps
        * np.linalg.norm(np.asarray(x, np.float64), axis=-1)[..., None]
        * np.linalg.norm(w_hat, axis=1)
        + 1e-6
    )


@each_of(COMPILED)
@pytest.mark.parametrize("activation_bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@CHECKS
@given(packed_weights(), st.integers(1, 40), st.integers(0, 99))
def test_agrees_with_float64(implementation, activation_bits, dtype, weight, rows, seed):
    assume(runs(implementation, weight[0]))
    check_agreement(implementation, activation_bits, dtype, weight, rows, seed)


@each_of(INTERPRETED)
@pytest.mark.parametrize("activation_bits", [16, 8])
@FEW_CHECKS
@given(
    packed_weights(), st.integers(1, 40), st.integers(0, 99),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)  # fmt: skip
def test_interpreted_kernels_agree_with_float64(
    implementation, activation_bits, weight, rows, seed, dtype
):
    assume(runs(implementation, weight[0]))
    check_agreement(implementation, activation_bits, dtype, weight, rows, seed)


compiled_matmul = jax.jit(kernels.mixed_matmul, static_argnums=2)


def check_agreement(implementation, activation_bits, dtype, weight, rows, seed):
    w, w_hat, bias = weight
    # In numpy, as drawn shapes would have every operation compiled anew.
    x = np.random.default_rng(seed).normal(size=(rows, w.shape[1])).astype(np.float32)
    x = x.astype(dtype)
    # One program instead of one for each of its operations, as in policies.
    y = compiled_matmul(x, kernels.prepare(w, implementation), activation_bits)
    assert y.dtype == dtype
    assert y.shape == (rows, w.shape[0])
    want = expected(x, w, w_hat, bias, activation_bits)
    allowed = tolerance(x, w_hat, 2e-5)
    if dtype == jnp.bfloat16:
        allowed = allowed + np.abs(want) * 2.0**-8
    assert (np.abs(np.asarray(y).astype(np.float64) - want) <= allowed).all()


@each_implementation
@pytest.mark.parametrize(("k", "bits", "group"), [(1, 16, 128), (60, 8, 48), (90, 4, 48)])
def test_groups_that_reach_beyond_the_inputs(implementation, k, bits, group):
    weight = random_weight(3, k, 0, ml_dtypes.bfloat16)
    w = kernels.pack(weight, np.full(3, bits), group, source_dtype="bfloat16")
    w_hat = np.asarray(kernels.dequantize(w), np.float64)
    check_agreement(implementation, 16, jnp.float32, (w, w_hat, np.zeros(3)), 2, 0)


@pytest.fixture(scope="module")
def weight():
    c, k = 70, 75
    source, bits = random_weight(c, k, 5, jnp.bfloat16), random_bits(c, 5)
    bias = np.random.default_rng(0).normal(size=c).astype(np.float32)
    return kernels.pack(source, bits, bias=bias)


@each_implementation
def test_any_leading_axes_jit_and_vmap(weight, implementation):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 75))
    f = functools.partial(kernels.mixed_matmul, implementation=implementation)
    y = f(x, weight)
    assert y.shape == (2, 3, 5, 70)
    flat = f(x.reshape(-1, 75), weight).reshape(y.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, flat)
    close(jax.jit(f)(x, weight), y)
    close(jax.vmap(f, (0, None))(x, weight), y)
    close(jax.jit(jax.vmap(jax.vmap(f, (0, None)), (1, None)))(x, weight), y.swapaxes(0, 1))
    close(f(x[0, 0, 0], weight), y[0, 0, 0])


@each_implementation
def test_prepared_weights_give_the_same(weight, implementation):
    x = jax.random.normal(jax.random.key(0), (4, 75))
    prepared = kernels.prepare(weight, implementation)
    expected_ = kernels.mixed_matmul(x, weight, implementation=implementation)
    np.testing.assert_array_equal(kernels.mixed_matmul(x, prepared), expected_)
    np.testing.assert_allclose(
        jax.jit(kernels.mixed_matmul)(x, prepared), expected_, rtol=1e-5, atol=1e-5
    )
    assert prepared.shape == weight.shape


@each_implementation
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_gradient_with_respect_to_activations(weight, implementation, activation_bits):
    x = jax.random.normal(jax.random.key(1), (4, 75))
    dy = jax.random.normal(jax.random.key(2), (4, 70))
    prepared = kernels.prepare(weight, implementation)

    def loss(x, dy):
        return jnp.vdot(kernels.mixed_matmul(x, prepared, activation_bits), dy)

    want = np.asarray(dy, np.float64) @ np.asarray(kernels.dequantize(weight), np.float64)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x, dy), want, rtol=1e-4, atol=1e-4)
    rows = jax.jit(jax.vmap(jax.grad(lambda x, dy: loss(x[None], dy[None]))))(x, dy)
    np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-4)


@each_implementation
def test_no_rows_and_zero_rows(weight, implementation):
    f = functools.partial(kernels.mixed_matmul, implementation=implementation)
    assert f(jnp.zeros((0, 75)), weight).shape == (0, 70)
    for bits in (16, 8, 4):
        y = f(jnp.zeros((3, 75)), weight, activation_bits=bits)
        np.testing.assert_array_equal(y, np.tile(weight.bias, (3, 1)))


def test_activation_codes():
    x = jnp.asarray([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    codes, scale = quantize_activations(x, 8)
    np.testing.assert_array_equal(codes, [[0, 0, 0], [64, -127, 32]])
    np.testing.assert_allclose(scale, [[0.0], [2 / 127]])
    assert np.abs(np.asarray(quantize_activations(x, 4)[0])).max() == 7


def test_bad_arguments_are_refused(weight):
    with pytest.raises(InputError, match=r"takes \[\.\.\., 75\]"):
        kernels.mixed_matmul(jnp.ones((2, 74)), weight)
    with pytest.raises(InputError, match="x is int32"):
        kernels.mixed_matmul(jnp.ones((2, 75), jnp.int32), weight)
    with pytest.raises(InputError, match="activation_bits 5"):
        kernels.mixed_matmul(jnp.ones((2, 75)), weight, 5)
    with pytest.raises(InputError, match="unknown implementation 'cuda'"):
        kernels.mixed_matmul(jnp.ones((2, 75)), weight, implementation="cuda")
