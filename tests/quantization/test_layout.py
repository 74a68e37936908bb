"""Bytes against an independent count, and the channel order."""

import math

import ml_dtypes
import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layout import (
    option_sizes,
    row_bytes,
    source_bytes,
    stored_bytes,
    uniform_bytes,
)


def layer(path="a", c=3, k=10, bias=False, source=2):
    return LayerInfo(path=path, out_features=c, fan_in=k, has_bias=bias, source_bytes=source)


INDEX = ChannelIndex((layer("a", 3, 10), layer("b", 2, 33, bias=True), layer("c", 1, 7, source=4)))


def packed_arrays(fan_in: int, bits: int, *, bias: bool, permuted: bool) -> int:
    """Packs a row for real and adds up what numpy holds."""
    arrays = []
    if bits == 16:
        arrays.append(np.zeros(fan_in + fan_in % 2, ml_dtypes.bfloat16))
    elif bits:
        stream = np.zeros(fan_in * bits, np.uint8)
        stream = np.concatenate([stream, np.zeros(-len(stream) % 32, np.uint8)])
        arrays.append(np.packbits(stream).view(np.uint32))
        arrays.append(np.zeros(1, ml_dtypes.bfloat16))
    if bias:
        arrays.append(np.zeros(1, ml_dtypes.bfloat16))
    if permuted and bits:
        arrays.append(np.zeros(1, np.uint16))
    return sum(a.nbytes for a in arrays)


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_row_bytes_equal_a_packed_row(bits, bias, permuted):
    for fan_in in (1, 7, 8, 15, 16, 17, 192, 768, 11008):
        assert row_bytes(fan_in, bits, bias=bias, permuted=permuted) == packed_arrays(
            fan_in, bits, bias=bias, permuted=permuted
        )


def test_known_rows():
    # 192 weights of 4 bits: 24 words, scale, bias, index.
    assert row_bytes(192, 4, bias=True) == 96 + 2 + 2 + 2
    assert row_bytes(192, 0, bias=True) == 2
    assert row_bytes(192, 0, bias=True, source_bytes=4) == 4
    assert row_bytes(192, 16, bias=False, permuted=False, source_bytes=4) == 768


def test_sizes_follow_the_channel_order():
    sizes = option_sizes(INDEX, (0, 4, 16))
    assert sizes.shape == (6, 3)
    assert sizes.dtype == np.int64
    for row in range(6):
        info = INDEX.layers[INDEX.layer_of[row]]
        for column, bits in enumerate((0, 4, 16)):
            assert sizes[row, column] == row_bytes(
                info.fan_in, bits, bias=True, source_bytes=info.source_bytes
            )


def test_stored_and_uniform_bytes():
    bits = np.array([0, 4, 16, 8, 2, 4])
    expected = sum(
        row_bytes(int(k), int(b), bias=True, source_bytes=4 if i == 5 else 2)
        for i, (k, b) in enumerate(zip(INDEX.fan_in, bits, strict=True))
    )
    assert stored_bytes(INDEX, bits) == expected
    # 3 rows of ceil(40 / 32) words, 2 of ceil(132 / 32) with a bias, 1 of ceil(28 / 32); no index.
    assert uniform_bytes(INDEX, 4) == 3 * (8 + 2) + 2 * (20 + 2 + 2) + (4 + 2)
    assert uniform_bytes(INDEX, 16) == 3 * 20 + 2 * (68 + 2) + 28


def test_average_bits_weigh_channels_by_their_weights():
    bits = np.array([16, 16, 16, 0, 0, 0])
    assert math.isclose(INDEX.average_bits(bits), 16 * 30 / (30 + 66 + 7))


def test_source_bytes_find_the_narrowest_exact_type():
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    assert source_bytes(weight) == 4
    assert source_bytes(weight.astype(ml_dtypes.bfloat16)) == 2
    assert source_bytes(weight.astype(ml_dtypes.bfloat16).astype(np.float32)) == 2


def test_index_knows_layers_channels_and_names():
    assert len(INDEX) == 6
    np.testing.assert_array_equal(INDEX.layer_of, [0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(INDEX.channel, [0, 1, 2, 0, 1, 0])
    np.testing.assert_array_equal(INDEX.fan_in, [10, 10, 10, 33, 33, 7])
    assert INDEX.name(4) == "b[1]"
    assert [rows for _, rows in INDEX.items()] == [slice(0, 3), slice(3, 5), slice(5, 6)]


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (np.full(5, 4), "expected 6 integers"),
        (np.full((6, 1), 4), "expected 6 integers"),
        (np.full(6, 4.0), "expected 6 integers"),
        (np.array([4, 4, 4, 4, 5, 4]), r"b\[1\] has 5"),
    ],
)
def test_wrong_bits_are_refused(bits, message):
    with pytest.raises(InputError, match=message):
        INDEX.check_bits(bits, (0, 4, 16))


def test_a_path_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        ChannelIndex((layer("a"), layer("a")))


def test_more_channels_than_the_index_serves_are_refused():
    with pytest.raises(InputError, match="16-bit index serves 65536"):
        ChannelIndex((layer("a", c=65537),))


def test_an_unknown_width_has_no_row():
    with pytest.raises(InputError, match="no row has 5 bits"):
        row_bytes(8, 5, bias=False)
