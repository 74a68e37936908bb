"""The CPU kernel's attention against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax.kernels import cpu, cpu_attention

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernel")


def exact(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask, logits, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def inputs(b, t, s, m, groups, d, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (b, t, m * groups, d), (b, s, m, d), (b, s, m, d)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 70, 90, 3, 3, 40))),
    mask_shape=st.sampled_from([None, (False, False), (True, False), (True, True), (False, True)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_that_of_float64(sizes, mask_shape, dtype, seed):
    q, k, v = (x.astype(dtype) for x in inputs(*sizes, seed=seed))
    b, t, s = sizes[:3]
    mask = None
    if mask_shape is not None:
        shape = (b if mask_shape[0] else 1, 1, t if mask_shape[1] else 1, s)
        mask = np.random.default_rng(seed).random(shape) < 0.6  # a query may attend to nothing
    y = cpu_attention.attention(q, k, v, mask)
    assert y.dtype == dtype
    tolerance = 5e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), exact(q, k, v, mask), atol=tolerance)


@pytest.mark.parametrize("sizes", [(1, 100, 80, 1, 2, 24), (2, 40, 40, 6, 1, 16)])
def test_any_number_of_threads_gives_the_same_bits(sizes):
    operands = inputs(*sizes)
    one = cpu_attention.attention(*operands, max_threads=1)
    for threads in (2, 3, 0):
        np.testing.assert_array_equal(one, cpu_attention.attention(*operands, max_threads=threads))


def test_numbers_that_are_not_finite_show():
    q, k, v = inputs(1, 30, 30, 2, 1, 8)
    y = np.asarray(cpu_attention.attention(q.at[0, 3, 1, 2].set(jnp.nan), k, v))
    assert np.isnan(y[0, 3, 1]).all()
    assert np.isfinite(np.delete(y, 3, axis=1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((1, 5, 3, 8))}, "shapes"),
        ({"q": jnp.ones((1, 4, 3, 8))}, "shapes"),
        ({"k": jnp.ones((1, 5, 2, 8), jnp.int32)}, "float32 or bfloat16"),
        ({"mask": jnp.ones((1, 1, 2, 5), bool)}, "mask"),
        ({"mask": jnp.ones((1, 1, 1, 5), jnp.int8)}, "mask"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    q, k, v = inputs(1, 4, 5, 2, 1, 8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"qvla_attention: .*{message}"):
        jax.block_until_ready(cpu_attention.attention(**({"q": q, "k": k, "v": v} | change)))
