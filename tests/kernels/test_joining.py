"""`join` and its inverse."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels.packed import validate

from .weights import pack_codes, random_weight


def make(c, k, bits, seed, group=None, dtype=np.float32, **settings_):
    # Codes do not matter here, and finding good ones takes long.
    rng = np.random.default_rng(seed)
    codes = 2 * rng.integers(-2, 2, (c, k)) + 1
    scales = np.ones((c, 1 if group is None else -(-k // group)), np.float32)
    widths = rng.choice(bits, c)
    return pack_codes(random_weight(c, k, seed, dtype), widths, codes, scales, group, **settings_)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 40),
    st.lists(st.sampled_from([0, 2, 3, 4, 8, 16]), min_size=1, max_size=4),
    st.sampled_from([None, 16]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_a_joined_weight_has_the_outputs_in_turn(sizes, k, bits, group, has_bias, seed):
    weights = [
        make(
            c, k, bits, seed + i, group, source_dtype="float32",
            bias=np.arange(c, dtype=np.float32) if has_bias else None,
        )
        for i, c in enumerate(sizes)
    ]  # fmt: skip
    joined = kernels.join(weights)
    validate(joined)
    rows = [kernels.dequantize(w) for w in weights]
    np.testing.assert_array_equal(kernels.dequantize(joined), np.concatenate(rows))
    start = 0
    for w in weights:
        again = kernels.part(joined, start, start + w.shape[0])
        assert jax.tree.structure(again) == jax.tree.structure(w)
        for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        start += w.shape[0]


def test_weights_without_an_index():
    weights = [make(5, 8, [4], 0, index=False), make(3, 8, [4], 1, index=False)]
    joined = kernels.join(weights)
    assert joined.index is None
    assert kernels.part(joined, 5, 8, index=False).index is None
    np.testing.assert_array_equal(
        kernels.dequantize(kernels.part(joined, 5, 8, index=False)), kernels.dequantize(weights[1])
    )
    # Of two widths the joined weight needs one, and gives back parts without.
    mixed = kernels.join([weights[0], make(3, 8, [8], 1, index=False)])
    validate(mixed)
    assert kernels.part(mixed, 0, 5, index=False).index is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(3, 9, [4], 0), "fan-ins differ: 8, 9"),
        (make(3, 8, [4], 0, 16), "groups differ: 16, None"),
        (make(3, 8, [4], 0, source_dtype="bfloat16"), "source dtypes differ"),
        (make(3, 8, [4], 0, bias=np.zeros(3, np.float32)), "biases differ: None, float32"),
        (make(65535, 8, [4], 0), "65538 output channels"),
    ],
)
def test_what_cannot_be_joined(other, message):
    with pytest.raises(InputError, match=message):
        kernels.join([make(3, 8, [4], 0, source_dtype="float32"), other])
    assert message in str(kernels.cannot_join([make(3, 8, [4], 0, source_dtype="float32"), other]))
