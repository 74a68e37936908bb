"""Channels dealt over devices: the same product, the same shares for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels import cpu
from qvla_jax.kernels.sharded import deal

from .test_joining import make
from .weights import packed_weights

IMPLEMENTATIONS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernel")
    ),
]


def mesh(devices=2):
    return Mesh(np.asarray(jax.devices()[:devices]), ("channel",))


def close(found, expected, w, bfloat16=False):
    """Within rounding of inputs of about 1: each product may sum in an order of its own."""
    size = np.linalg.norm(np.asarray(kernels.dequantize(w)), axis=1)
    allowed = 2e-5 * (np.sqrt(w.shape[1]) * size + 1) + bfloat16 * 2.0**-8 * np.abs(expected)
    assert (np.abs(np.asarray(found) - np.asarray(expected)) <= allowed).all()


@settings(deadline=None, max_examples=15)
@given(packed_weights(), st.integers(1, 8))
def test_devices_have_equal_shares_which_hold_every_channel(weight, devices):
    w, w_hat, bias = weight
    shares, position, pruned = deal(w, devices)
    assert len(shares) == devices
    np.testing.assert_array_equal(pruned, np.flatnonzero(w.bits() == 0))
    for share in shares:
        if w.segments:
            kernels.validate(share)
        assert jax.tree.structure(share) == jax.tree.structure(shares[0])
    rows = [np.asarray(kernels.dequantize(share)) for share in shares]
    whole = np.concatenate([*rows, np.zeros((len(pruned), w.shape[1]))])
    np.testing.assert_array_equal(whole[position], w_hat)
    if w.bias is not None:
        biases = [np.asarray(share.bias) for share in shares]
        np.testing.assert_array_equal(np.concatenate([*biases, bias[pruned]])[position], bias)


def test_channels_that_do_not_divide_move_to_a_wider_width_where_that_is_smaller():
    w = make(26, 64, [4], 0)
    wide = make(6, 64, [8], 1)
    shares, _, _ = deal(kernels.join([w, wide]), 8)
    # 26 rows of 4 bits are 3 for each device and 2 more, which fill up the 6 rows of 8 bits.
    assert [(s.bits, s.rows) for s in shares[0].segments] == [(8, 1), (4, 3)]
    # Alone, they would cost more at 8 bits than 6 rows of padding at 4.
    shares, _, _ = deal(make(30, 64, [4], 0), 8)
    assert [(s.bits, s.rows) for s in shares[0].segments] == [(4, 4)]


@settings(deadline=None, max_examples=10)
@given(packed_weights(), st.integers(1, 2), st.sampled_from(["reference", None]))
def test_dealing_is_inverted_exactly(weight, devices, implementation):
    w = weight[0]
    again = kernels.canonical(kernels.shard(w, mesh(devices), "channel", implementation))
    assert jax.tree.structure(again) == jax.tree.structure(w)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@functools.cache
def query_key_value(group):
    """One weight with every width and pruned channels."""
    rng = np.random.default_rng(0)
    parts = [
        make(
            c, 131, [0, 2, 3, 4, 8, 16], seed, group, dtype=jnp.bfloat16,
            source_dtype="bfloat16", bias=rng.normal(size=c).astype(np.float32),
        )
        for seed, c in enumerate((64, 33, 31))
    ]  # fmt: skip
    return kernels.join(parts)


@pytest.fixture
def joined():
    return query_key_value(48)


@pytest.mark.parametrize("group", [None, 48])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_devices_give_what_one_gives(group, implementation):
    joined = query_key_value(group)
    sharded = kernels.shard(joined, mesh(), "channel", implementation)
    one = kernels.prepare(joined, implementation)
    for activation_bits, rows, dtype in (
        (16, 1, jnp.float32), (16, 30, jnp.bfloat16), (8, 30, jnp.float32)
    ):  # fmt: skip
        x = jax.random.normal(jax.random.key(rows), (2, rows, 131)).astype(dtype)
        product = jax.jit(functools.partial(kernels.mixed_matmul, activation_bits=activation_bits))
        expected, found = product(x, one), product(x, sharded)
        assert found.dtype == dtype
        assert found.sharding.is_fully_replicated
        same = functools.partial(close, np.asarray(found, np.float32), w=joined)
        same(np.asarray(expected, np.float32), bfloat16=dtype == jnp.bfloat16)


def test_every_device_runs_its_share_and_the_outputs_meet_once(joined):
    sharded = kernels.shard(joined, mesh(), "channel", "reference")
    compiled = jax.jit(kernels.mixed_matmul).lower(jnp.ones((3, 131)), sharded).compile()
    assert compiled.as_text().count("all-gather(") == 1
    for array in jax.tree.leaves(sharded.shards):
        assert array.addressable_shards[0].data.shape == (1, *array.shape[1:])


def test_gradients_and_vmap(joined):
    sharded = kernels.shard(joined, mesh(), "channel", "reference")
    x = jax.random.normal(jax.random.key(1), (3, 4, 131))
    dy = jax.random.normal(jax.random.key(2), (3, 4, 128))

    @jax.jit
    def both(x, dy):
        y, back = jax.vjp(lambda x: jax.vmap(kernels.mixed_matmul, (0, None))(x, sharded), x)
        return y, back(dy)[0]

    y, dx = both(x, dy)
    w_hat = np.asarray(kernels.dequantize(joined), np.float64)
    np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ w_hat, rtol=1e-4, atol=1e-3)
    close(y, np.asarray(x, np.float64) @ w_hat.T + np.asarray(joined.bias), joined)


def test_other_axes_of_the_mesh_repeat_the_weight(joined):
    both = Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1), ("data", "channel"))
    sharded = kernels.shard(joined, both, "channel", "reference")
    x = jax.random.normal(jax.random.key(0), (4, 131))
    expected = np.asarray(x, np.float64) @ np.asarray(kernels.dequantize(joined), np.float64).T
    close(jax.jit(kernels.mixed_matmul)(x, sharded), expected + np.asarray(joined.bias), joined)


@pytest.mark.parametrize(
    ("c", "bits"), [(1, [4]), (3, [0]), (2, [2, 8])], ids=["one channel", "all pruned", "two"]
)
def test_fewer_channels_than_devices_can_share(c, bits):
    w = make(c, 9, bits, 0, bias=np.arange(c, dtype=np.float32))
    x = jax.random.normal(jax.random.key(0), (5, 9))
    sharded = kernels.shard(w, mesh(), "channel")
    product = jax.jit(kernels.mixed_matmul)
    w_hat = np.asarray(kernels.dequantize(w), np.float64)
    close(product(x, sharded), np.asarray(x, np.float64) @ w_hat.T + np.asarray(w.bias), w)
    assert product(x[:0], sharded).shape == (0, c)


def test_what_cannot_be_sharded(joined):
    with pytest.raises(InputError, match="none is 'model'"):
        kernels.shard(joined, mesh(), "model")
    sharded = kernels.shard(joined, mesh(), "channel")
    with pytest.raises(InputError, match="prepared for 'sharded', not for 'cpu'"):
        kernels.mixed_matmul(jnp.ones((1, 131)), sharded, implementation="cpu")
