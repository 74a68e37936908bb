"""Tiles: exactly invertible, the same on the host and traced, and no larger than they must be."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.kernels import tiles
from qvla_jax.kernels.packed import Segment

from .weights import pack_codes, packed_weights, random_bits, random_weight


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=30)
@given(packed_weights(), st.sampled_from([32, 128]), st.sampled_from([16, 32]))
def test_the_arrangement_is_inverted_exactly(weight, depth, lanes):
    w = weight[0]
    if w.source_dtype != "bfloat16" and any(s.bits == 16 for s in w.segments):
        return  # refused by every implementation that arranges tiles
    assert_same(tiles.restore(tiles.arrange(w, depth, lanes)), w)


@pytest.mark.parametrize("group", [None, 32])
def test_the_arrangement_of_traced_weights_is_the_same(group):
    weight = random_weight(150, 300, 0, ml_dtypes.bfloat16)
    w = kernels.pack(weight, random_bits(150, 0), group, bias=weight[:, 0])
    host = tiles.arrange(w, 32, 16)
    traced = jax.jit(lambda w: tiles.arrange(w, 32, 16))(jax.tree.map(jnp.asarray, w))
    assert_same(jax.device_get(traced), host)
    assert_same(jax.device_get(jax.jit(tiles.restore)(traced)), w)


def test_words_hold_planes():
    codes = np.random.default_rng(0).integers(-8, 8, (4, 40)).astype(np.int8)
    w = pack_codes(np.zeros((4, 40), np.float32), np.full(4, 4), codes, np.ones((4, 1)))
    words = tiles.arrange(w, 4, 2).words
    assert words.shape == (4, 4, 2)  # two tiles of two blocks, each for 8 planes of 4 inputs
    padded = np.pad(codes, ((0, 0), (0, 24)))
    for channel in range(4):
        for i in range(64):
            block, rest = divmod(i, 32)
            plane, word = divmod(rest, 4)
            held = words[channel // 2 * 2 + block, word, channel % 2]
            assert ((int(held) >> 4 * plane) & 15) == padded[channel, i] % 16


def test_rows_move_to_wider_tiles_where_that_saves_bytes():
    # 130 rows of 2 bits would need two tiles, and 100 of 4 bits have 28 lanes to spare.
    parts = tiles.plan((Segment(4, 100), Segment(2, 130)), 128)
    assert [(p.bits, p.rows, p.tiles(128)) for p in parts] == [(4, 102, 1), (2, 128, 1)]
    # With 127 rows of 4 bits the move would open a tile of 4 bits for 2 rows.
    parts = tiles.plan((Segment(4, 127), Segment(2, 130)), 128)
    assert [(p.bits, p.rows) for p in parts] == [(4, 127), (2, 130)]
    # Never to 16 bits, where activations are not rounded.
    parts = tiles.plan((Segment(16, 100), Segment(8, 130)), 128)
    assert [(p.bits, p.rows) for p in parts] == [(16, 100), (8, 130)]
