"""Codes in words."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax.errors import InputError
from qvla_jax.kernels.codes import pack_words, to_unsigned, unpack_words
from qvla_jax.quantization.codes import CodeMap, code_map


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 4, 8, 16]), st.integers(1, 70), st.integers(0, 2**16))
def test_words_are_a_little_endian_bit_stream(bits, k, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, k)).astype(np.uint16)
    words = pack_words(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (3, -(-k * bits // 32))
    for row in range(3):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        assert words[row].tolist() == [
            (stream >> 32 * i) & 0xFFFFFFFF for i in range(len(words[0]))
        ]
    np.testing.assert_array_equal(unpack_words(words, bits, k), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_jax_and_numpy_unpack_alike(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 45)).astype(np.uint16)
    words = pack_words(codes, bits)
    np.testing.assert_array_equal(pack_words(jnp.asarray(codes), bits), words)
    np.testing.assert_array_equal(unpack_words(jnp.asarray(words), bits, 45), codes)


def test_odd_codes_are_for_the_fitted_2_bit_grid_alone():
    assert code_map(2, "fitted") == CodeMap(2, -3)
    assert code_map(2, "rtn") == CodeMap(1, -2)
    assert code_map(4, "fitted") == CodeMap(1, -8)


def test_codes_off_their_grid_are_refused():
    with pytest.raises(InputError, match=r"row 1, column 0 holds 2.*2-bit codes -3, -1"):
        to_unsigned(np.array([[1, -3], [2, 1]]), 2, CodeMap(2, -3))
    with pytest.raises(InputError, match="holds 8"):
        to_unsigned(np.array([[8]]), 4, CodeMap(1, -8))
